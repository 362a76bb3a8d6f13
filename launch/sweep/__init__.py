"""Many runs from one configuration: a manifest of them, their jobs, and how far they are."""
