"""Methods: what is trainable and how a release updates it."""
