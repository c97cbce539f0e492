"""The site's pages: the documents of the root, and texts and pictures beside raw results."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for pattern in ("*.md", "benchmarks/**/*.md", "benchmarks/**/*.png"):
        for path in sorted(ROOT.glob(pattern)):
            files.append(
                File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path))
            )
    return files
