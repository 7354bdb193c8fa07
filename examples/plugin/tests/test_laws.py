"""The laws of weftlm over the methods of this package: one import per kind, from a checkout of weftlm."""

from laws.test_policies import *  # noqa: F403
from laws.test_routers import *  # noqa: F403
