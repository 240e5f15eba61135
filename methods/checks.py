"""What methods refuse before they begin."""

import loop
from plumbing.files import InputError


def refuse(o: loop.Options, *names: str) -> None:
    """InputError if an option that a method fixes, or does not have, is not at its default."""
    defaults = type(o)()
    for name in names:
        given, fixed = getattr(o, name), getattr(defaults, name)
        if given != fixed:
            flag = name.replace("_", "-")
            fix = f"let it be {fixed}" if fixed else "leave it out"
            raise InputError(f"--{flag} {given}: not for this method; {fix}")


def need_several(samples: int, flag: str) -> None:
    if samples < 2:
        raise InputError(f"{flag} {samples}: the best and the worst are taken; give at least 2")
