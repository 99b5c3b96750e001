"""Text, digits and synthetic tasks, as streams of batches."""

from .batching import batches as batches
from .batching import packed as packed
from .batching import pad as pad
from .batching import padding_share as padding_share
from .handwritten_digits import Digits as Digits
from .handwritten_digits import digits as digits
from .synthetic import ADDING_BASELINE as ADDING_BASELINE
from .synthetic import adding_problem as adding_problem
from .synthetic import copy_baseline as copy_baseline
from .synthetic import copy_memory as copy_memory
from .text import Corpus as Corpus
from .text import UnknownCharacter as UnknownCharacter
from .text import decode as decode
from .text import encode as encode
from .text import manual_topics as manual_topics
from .text import split as split
from .text import unigram_entropy as unigram_entropy
from .text import windows as windows
from .text_files import read_text as read_text
