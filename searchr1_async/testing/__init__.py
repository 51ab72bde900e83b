"""For tests of what is built on this package: no model, no key, no network.

As ``sr.testing``: a service that answers by a script, stand-ins for a policy, a search and an embedder, and a tiny model.
"""

from typing import TYPE_CHECKING

from searchr1_async.boundary import lazy_names

if TYPE_CHECKING:
    from searchr1_async.local.process import TimedReply as TimedReply
    from searchr1_async.testing.stand_ins import BrokenPolicy as BrokenPolicy
    from searchr1_async.testing.stand_ins import BrokenSearch as BrokenSearch
    from searchr1_async.testing.stand_ins import DictSearch as DictSearch
    from searchr1_async.testing.stand_ins import HashingEmbedder as HashingEmbedder
    from searchr1_async.testing.stand_ins import ScriptedPolicy as ScriptedPolicy
    from searchr1_async.testing.stand_ins import make_tiny_model as make_tiny_model
    from searchr1_async.testing.stand_ins import make_tiny_tokenizer as make_tiny_tokenizer
    from searchr1_async.testing.stand_ins import scripted_service as scripted_service
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
