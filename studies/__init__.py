"""What only the benchmark needs: tasks, rivals, tuning, the log of runs, statistics, tables."""
