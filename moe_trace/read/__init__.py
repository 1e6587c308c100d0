"""From a trace file to answers: streaming, phases, speed, findings. Nothing in here imports torch."""
