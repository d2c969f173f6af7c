"""Runs the commands of the JSON argument, {name: [arguments of npu-rec]}; prints {name: the document it printed}."""

import io
import json
import sys
from contextlib import redirect_stdout

from npu_rec.cli import app

documents = {}
for name, arguments in json.loads(sys.argv[1]).items():
    printed = io.StringIO()
    with redirect_stdout(printed):
        app(args=arguments, standalone_mode=False)
    documents[name] = json.loads(printed.getvalue())
print(json.dumps(documents))
