"""What `regrow-new` writes: a project of one's own. `regrow.launch.template.mylab` becomes the new package's name."""
