# Prints the indices of the devices that this job was given on one node, as `0,1,4`.
#   $1: node, $2: name of the GRES; stdin: the answer of `scontrol show job -d`
granted_devices() {
  local line nodes part found=""
  while read -r line; do
    [[ $line =~ (^|[[:space:]])Nodes=([^[:space:]]+) ]] || continue
    nodes=${BASH_REMATCH[2]}
    [[ $line =~ [=,]"$2"(:[^,:\(]+)?:[0-9]+\(IDX:([0-9,-]+)\) ]] || continue
    part=${BASH_REMATCH[2]}
    nodes=$(scontrol show hostnames "$nodes")
    [[ $'\n'$nodes$'\n' == *$'\n'"$1"$'\n'* ]] && found+=" ${part//,/ }"
  done
  for part in $found; do
    seq "${part%-*}" "${part#*-}"
  done | paste --serial --delimiters=,
  [[ -n $found ]]
}
