"""Adds the member ``CSKV`` to PEFT's closed enum of adapter types; private API of `enum`, checked on CPython 3.10 to
3.13."""

from __future__ import annotations

from peft.utils import PeftType

NAME = "CSKV"


def ensure_peft_type() -> PeftType:
    """Return ``PeftType.CSKV``, adding it first if need be.

    PEFT offers no way in: `register_peft_method` refuses names that `PeftType` lacks. With the member added, all else
    goes through PEFT's own registration and its checks.
    """
    if NAME in PeftType.__members__:
        return PeftType[NAME]
    member = str.__new__(PeftType, NAME)
    member._name_, member._value_ = NAME, NAME
    member._sort_order_ = len(PeftType)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    type.__setattr__(PeftType, NAME, member)
    return member
