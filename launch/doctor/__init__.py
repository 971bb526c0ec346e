"""What `regrow doctor` looks at. Nothing here imports torch but the two probes, which run in processes of their own."""
