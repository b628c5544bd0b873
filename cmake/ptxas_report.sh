#!/bin/sh
# Compiler launcher for nvcc: runs the command it is given, and moves what ptxas reports (registers, shared
# memory, spills per kernel and architecture) from stderr into <object>.ptxas. The rest passes through.
object=
previous=
for argument; do
  [ "$previous" = "-o" ] && object=$argument
  previous=$argument
done
[ -n "$object" ] || exec "$@"
"$@" 2>"$object.stderr"
status=$?
grep -E '^ptxas info|^ +[0-9]+ bytes stack frame' "$object.stderr" >"$object.ptxas"
grep -vE '^ptxas info|^ +[0-9]+ bytes stack frame' "$object.stderr" >&2
rm -f "$object.stderr"
exit $status
