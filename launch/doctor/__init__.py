"""What `regrow doctor` looks at. Only the two probes import torch, in processes of their own."""
