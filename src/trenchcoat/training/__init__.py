"""The training loop of both stages: objectives, schedules, gradients, resumable checkpoints."""
