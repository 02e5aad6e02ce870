"""The spec language: YAML in, typed and positioned `Spec` out."""
