"""The process that the emulated kernels run in: reads pickled requests, writes pickled replies.

It is started with AddressSanitizer preloaded and imports nothing but the standard library and the module. A
fault that the sanitizer finds ends it; client.py turns what it wrote into an exception.
"""

import os
import pickle
import sys

sys.path.insert(0, sys.argv[1])
import cuda_emulated

replies = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)  # nothing that prints may land between the replies
while True:
    try:
        function, request = pickle.load(sys.stdin.buffer)
    except EOFError:
        break
    try:
        reply = ("ok", getattr(cuda_emulated, function)(request))
    except Exception as error:
        reply = ("error", f"{type(error).__name__}: {error}")
    pickle.dump(reply, replies)
    replies.flush()
