"""The zoo: the whole job on tiny models of many architectures, written to ``docs/zoo.md``."""
