"""From a source to a corpus folder: units of work, workers that share them, and the manifest that comes last."""
