"""Tasks: what is learned and how it is scored. One file per kind of task, one yaml per task."""
