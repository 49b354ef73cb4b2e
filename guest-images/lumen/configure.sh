#!/bin/sh
# Turns the freshly installed Debian in $1 into lumen. The files of files/ are in place already.
# May run again on its own result: an interrupted build does.
set -eu
root=$1
cd "$root"

# --- users -------------------------------------------------------------------------------------------------
# "*" is a password that nothing matches, but no locked account: keys work.
if ! grep -q '^catalyst:' etc/passwd; then
	chroot . useradd --create-home --shell /bin/bash --user-group --uid 1000 --password '*' catalyst
fi
chroot . usermod --append --groups docker,sudo catalyst
chroot . install -d -m 0700 -o catalyst -g catalyst /home/catalyst/.ssh
chroot . install -d -m 0700 /root/.ssh
chmod 0440 etc/sudoers.d/catalyst
chroot . visudo -cq

# --- identity: every VM gets its own from the agent ----------------------------------------------------------
: >etc/machine-id
rm -f var/lib/dbus/machine-id etc/ssh/ssh_host_* etc/docker/key.json var/lib/systemd/random-seed var/lib/systemd/credential.secret
ln -sf /etc/machine-id var/lib/dbus/machine-id
echo lumen >etc/hostname
rm -f etc/resolv.conf
: >etc/resolv.conf
: >etc/fstab

# --- apt: of what the build set, only what is right in a VM stays -------------------------------------------
rm -f etc/apt/apt.conf.d/99mmdebstrap
if [ -f etc/dpkg/dpkg.cfg.d/99mmdebstrap ]; then
	grep '^path-' etc/dpkg/dpkg.cfg.d/99mmdebstrap >etc/dpkg/dpkg.cfg.d/catalyst
	rm etc/dpkg/dpkg.cfg.d/99mmdebstrap
fi

# --- what docker-machine and people call -------------------------------------------------------------------
# Debian has /usr/sbin/dockerd; the provisioner of docker-machine calls /usr/bin/dockerd.
[ -e usr/bin/dockerd ] || ln -s ../sbin/dockerd usr/bin/dockerd
# sbin in the PATH of ssh sessions and plain users as well.
echo 'PATH="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"' >etc/environment
# Clients of VMware's tools mount folders of the host by these.
chmod 0755 usr/bin/vmhgfs-fuse
ln -sf ../bin/vmhgfs-fuse usr/sbin/mount.vmhgfs
mkdir -p mnt/hgfs
# The iptables that Docker calls: the variant on nf_tables is Debian's default and stays.

# --- systemd: only what a VM needs -------------------------------------------------------------------------
system=etc/systemd/system
mask() {
	for unit; do
		ln -sf /dev/null "$system/$unit"
	done
}
# A clone's clock jumps from its template's day to today: no timer may be due because of that.
mask apt-daily.timer apt-daily.service apt-daily-upgrade.timer apt-daily-upgrade.service \
	dpkg-db-backup.timer dpkg-db-backup.service fstrim.timer e2scrub_all.timer e2scrub_reap.service \
	man-db.timer logrotate.timer systemd-tmpfiles-clean.timer
# Hardware, consoles and boot ways that this machine does not have; state that it does not keep.
mask systemd-pstore.service systemd-hwdb-update.service systemd-firstboot.service systemd-sysusers.service \
	systemd-machine-id-commit.service systemd-repart.service systemd-pcrphase.service \
	systemd-pcrphase-sysinit.service systemd-boot-system-token.service systemd-update-utmp.service \
	systemd-update-utmp-runlevel.service systemd-journal-flush.service systemd-remount-fs.service \
	systemd-ask-password-console.path systemd-ask-password-wall.path systemd-logind.service \
	systemd-initctl.socket systemd-journald-audit.socket systemd-journal-catalog-update.service \
	systemd-binfmt.service proc-sys-fs-binfmt_misc.automount systemd-networkd.service systemd-networkd.socket \
	systemd-networkd-wait-online.service networking.service ifupdown-pre.service \
	cryptsetup.target integritysetup.target veritysetup.target remote-cryptsetup.target \
	getty@tty1.service getty-static.service kmod-static-nodes.service systemd-tmpfiles-setup-dev.service \
	systemd-random-seed.service \
	dev-hugepages.mount dev-mqueue.mount sys-kernel-debug.mount sys-kernel-tracing.mount \
	sys-kernel-config.mount sys-fs-fuse-connections.mount
mkdir -p etc/systemd/system-generators
for generator in usr/lib/systemd/system-generators/*; do
	ln -sf /dev/null "etc/systemd/system-generators/${generator##*/}"
done
rm -rf "$system/sysinit.target.wants" "$system/timers.target.wants" "$system/getty.target.wants" \
	"$system/multi-user.target.wants" "$system/sockets.target.wants" "$system/sshd.service"
wants() {
	target=$1
	shift
	mkdir -p "$system/$target.wants"
	for unit; do
		ln -sf "$(cd "$system" && if [ -e "$unit" ]; then echo ..; else echo /lib/systemd/system; fi)/$unit" \
			"$system/$target.wants/$unit"
	done
}
wants sysinit.target catalyst-agent.service apparmor.service
wants sockets.target docker.socket
wants multi-user.target containerd.service docker.service ssh.service
ln -sf ssh.service "$system/sshd.service"
mkdir -p "$system/getty.target.wants"
ln -sf /lib/systemd/system/serial-getty@.service "$system/getty.target.wants/serial-getty@ttyS0.service"
ln -sf /lib/systemd/system/multi-user.target "$system/default.target"

# --- udev: disks, terminals and ports; a container's network interface costs no processes -----------------------
mkdir -p etc/udev/rules.d
for rules in usr/lib/udev/rules.d/*.rules; do
	case ${rules##*/} in
	50-udev-default.rules | 60-block.rules | 60-persistent-storage.rules) ;;
	99-systemd.rules) sed '/SUBSYSTEM=="net"/d' "$rules" >etc/udev/rules.d/99-systemd.rules ;;
	*) ln -sf /dev/null "etc/udev/rules.d/${rules##*/}" ;;
	esac
done

# --- what nobody reads here --------------------------------------------------------------------------------
rm -rf usr/share/doc/* usr/share/man/* usr/share/locale/* usr/share/info/* usr/share/lintian usr/share/bug \
	usr/lib/firmware usr/share/X11 usr/lib/udev/hwdb.d usr/lib/udev/hwdb.bin etc/update-motd.d etc/motd \
	usr/share/bash-completion usr/share/zsh usr/share/fish usr/share/gcc usr/share/gdb usr/share/pixmaps
rm -rf var/cache/apt/* var/lib/apt/lists/* var/cache/debconf/*-old var/lib/dpkg/*-old var/cache/ldconfig/aux-cache \
	var/log/apt var/log/*.log var/log/journal tmp/* var/tmp/* run/* usr/share/docker.io/contrib
find usr -name '__pycache__' -prune -exec rm -rf {} +
