"""python3 -m sglang.launch_server"""

import sys

from sglang import server

if __name__ == "__main__":
    server.serve(server.parse(sys.argv[1:]))
