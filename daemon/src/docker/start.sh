# Makes namespaces fit for Docker's daemon, then becomes it: sh -ec THIS sh DAEMON RUN BRIDGE MAC ADDRESS GATEWAY PROGRAM...
# It runs in a mount and a network namespace of its own; its stdin is the socket that Docker's daemon listens on.
daemon=$1 run=$2 bridge=$3 mac=$4 address=$5 gateway=$6
shift 6
umask 022
# The host's network: ports are published there. This mount also tells who belongs here.
mount --bind "/proc/$daemon/ns/net" "$run/host-net"
# What another Docker or containerd of this machine has here is neither used nor changed.
mount -t tmpfs -o mode=755 tmpfs /run/catalyst/docker
mount -t tmpfs -o mode=711 tmpfs /run/containerd
mkdir /run/catalyst/docker/upper /run/catalyst/docker/work
mount -t overlay -o lowerdir=/etc/docker,upperdir=/run/catalyst/docker/upper,workdir=/run/catalyst/docker/work \
  overlay /etc/docker
[ ! -e /etc/resolv.conf ] || mount --bind "$run/resolv.conf" /etc/resolv.conf
# A cable to the bridge of the VMs. Its end there is called as their taps are, which NetworkManager leaves alone.
port=cattapd$$
echo "$port" >"$run/cable"
ip link set lo up
ip link add eth0 address "$mac" type veth peer name "$port" netns "$daemon"
in_host() { nsenter --net="$run/host-net" "$@"; }
in_host sh -c "echo 1 >/proc/sys/net/ipv6/conf/$port/disable_ipv6" 2>/dev/null || true
in_host ip link set "$port" master "$bridge" up
ip address add "$address" dev eth0
ip link set eth0 up
ip route add default via "$gateway"
export LISTEN_PID=$$
exec "$@" 3<&0 0</dev/null
