"""Hydra reads and parses all of conf/ for each composition, and a test run makes hundreds: equal texts are parsed once."""

import pickle
from functools import cache

import omegaconf
import yaml


def parse_once() -> None:
    """Saves a third of a composition. What is parsed is never changed; of a yaml file's content everyone gets a copy."""
    remembered = cache(omegaconf.grammar_parser.parse)
    for module in (omegaconf.base, omegaconf._utils, omegaconf.resolvers.oc):
        module.parse = remembered
    load, contents = yaml.load, {}

    def load_once(stream, Loader):
        text = stream if isinstance(stream, str) else stream.read()
        key = (text, Loader.__qualname__)
        if key not in contents:
            contents[key] = pickle.dumps(load(text, Loader))
        return pickle.loads(contents[key])

    yaml.load = load_once
