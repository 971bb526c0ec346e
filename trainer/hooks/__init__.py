"""The hooks that come with Regrow, one file each; `regrow.trainer.hook` is what they implement."""
