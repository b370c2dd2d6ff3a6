"""The YAML files that ship, as data of the package."""
