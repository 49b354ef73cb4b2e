# Catalyst. Two commands do everything: `make demo` shows it, `make test` proves it.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: versions help setup setup-tests build lean place gem ui ui-tools image demo test unit rspec e2e e2e-needs e2e-run e2e-lab e2e-kvm test-full test-long lint licences oci-checks cri-checks fuzz fuzz-short fuzz-aside bench bench-monitor bench-kvm lab schemathesis install install-files uninstall deb clean go machine-driver machine-tools docker-tools firewall-tools

SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
RELEASE := target/release
GNU := x86_64-unknown-linux-gnu
# Shared between checkouts and state folders; the key of an image's content is in its path.
IMAGE_DIR ?= /var/lib/catalyst/images
export CATALYST_IMAGE_DIR := $(IMAGE_DIR)
PREFIX ?= /usr/local

# Programs that are needed, each with the Debian package it comes from.
NEEDS := qemu-system-x86_64:qemu-system-x86 qemu-img:qemu-utils dnsmasq:dnsmasq-base nft:nftables \
         mmdebstrap:mmdebstrap busybox:busybox-static mke2fs:e2fsprogs ssh:openssh-client ip:iproute2 \
         cpio:cpio depmod:kmod strip:binutils xz:xz-utils zstd:zstd jq:jq curl:curl ping:iputils-ping cc:gcc strace:strace

# Called with what is missing.
INSTALL := $(SUDO) apt-get update -qq && $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends

# What only tests need: the programs that Catalyst is driven by.
TEST_NEEDS := vagrant:vagrant rspec:ruby-rspec openssl:openssl lintian:lintian chromium:chromium node:nodejs npm:npm \
              docker-compose:docker-compose tcsh:tcsh fish:fish iptables:iptables ufw:ufw

help: ## show this
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## install what is missing (Debian packages)
	@missing=; for need in $(NEEDS); do PATH=$$PATH:/usr/sbin:/sbin command -v $${need%%:*} >/dev/null || missing="$$missing $${need##*:}"; done; \
	[ -f /usr/share/seabios/bios-microvm.bin ] || missing="$$missing seabios"; \
	[ -f /usr/share/OVMF/OVMF_CODE_4M.fd ] || missing="$$missing ovmf"; \
	if [ -n "$$missing" ]; then echo "installing:$$missing"; $(INSTALL) $$missing >/dev/null; fi
	@command -v cargo >/dev/null || { echo "Rust is missing: install it by rustup (stable, 1.95 or later)" >&2; exit 1; }

setup-tests: setup ## install what only tests need besides
	@missing=; for need in $(TEST_NEEDS); do PATH=$$PATH:/usr/sbin:/sbin command -v $${need%%:*} >/dev/null || missing="$$missing $${need##*:}"; done; \
	python3 -m pip --version >/dev/null 2>&1 || missing="$$missing python3-pip"; \
	/usr/bin/python3 -c 'import docker, paramiko' 2>/dev/null || missing="$$missing python3-docker python3-paramiko"; \
	if [ -n "$$missing" ]; then echo "installing:$$missing"; $(INSTALL) $$missing >/dev/null; fi

# Go is needed for the docker-machine driver alone: with-go takes the machine's own, or fetches one by pip.
WITH_GO := drivers/docker-machine/with-go
go: setup
	@$(WITH_GO) go version >/dev/null 2>&1 || python3 -m pip --version >/dev/null 2>&1 || \
	  { echo 'installing: python3-pip'; $(INSTALL) python3-pip >/dev/null; }
	@$(WITH_GO) go version

machine-driver: go ## build the docker-machine driver into target/release
	CGO_ENABLED=0 $(WITH_GO) go build -trimpath -ldflags=-s -o $(CURDIR)/$(RELEASE)/ .

# The real programs that its tests use: rancher-machine, and Docker's client.
MACHINE_TOOLS := $(CURDIR)/$(RELEASE)/machine
machine-tools: go
	@mkdir -p $(MACHINE_TOOLS)
	CGO_ENABLED=0 $(WITH_GO) go build -trimpath -ldflags=-s -o $(MACHINE_TOOLS)/ tool
	@PATH=$(MACHINE_TOOLS):$$PATH command -v docker >/dev/null || { $(MAKE) -s docker-tools && ln -sf ../docker-tools/docker $(MACHINE_TOOLS)/; }

DOCKER_TOOLS := $(CURDIR)/$(RELEASE)/docker-tools
# Debian has Docker's client in one package with the daemon, which is not to be started here, so it alone is taken out of it.
docker-tools: ## Debian's Docker client, for the tests
	@mkdir -p $(DOCKER_TOOLS); [ -x /usr/bin/docker ] || [ -x $(DOCKER_TOOLS)/docker ] || { echo "fetching Docker's client"; \
	  $(SUDO) apt-get update -qq && folder=$$(mktemp -d) && cd $$folder && \
	  apt-get download -qq -o APT::Sandbox::User=root docker.io && dpkg-deb --extract docker.io_*.deb . && \
	  install -m 755 usr/bin/docker $(DOCKER_TOOLS)/ && rm -r $$folder; }

firewall-tools: setup-tests ## Debian's firewalld, NetworkManager and Docker daemon, unpacked for the tests
	@tests/firewall-tools $(CURDIR)/$(RELEASE)/firewall-tools

# What asks the daemon by the descriptions of its API, of the versions that are written down.
ASKER := $(CURDIR)/$(RELEASE)/schemathesis
ASKER_PINS := tests/e2e/schemas/requirements.txt
schemathesis: setup-tests
	@cmp -s $(ASKER_PINS) $(ASKER)/requirements.txt || { echo 'fetching schemathesis'; rm -rf $(ASKER); \
	  python3 -m pip install --quiet --disable-pip-version-check --no-deps --target $(ASKER) -r $(ASKER_PINS) && cp $(ASKER_PINS) $(ASKER)/; }

build: setup lean ## build everything into target/release
	cargo build --release --workspace --exclude catalyst-agent --exclude catalyst-vmm

# Two programs are linked statically and as small as they go: the agent runs in guests, whatever C library they have, and
# every VM has a monitor of its own. They are put where the others are; what Cargo's own tests leave there is replaced.
lean:
	RUSTFLAGS="-C target-feature=+crt-static" cargo build --profile lean --target $(GNU) --target-dir target/lean -p catalyst-agent -p catalyst-vmm
	@$(MAKE) -s place

LEAN := target/lean/$(GNU)/lean
place:
	@mkdir -p $(RELEASE); place() { cmp -s $(LEAN)/$$1 $(RELEASE)/$$2 || install -m 755 $(LEAN)/$$1 $(RELEASE)/$$2; }; \
	place catalyst-agent catalyst-agent-static && place catalyst-vmm catalyst-vmm

gem: ## build the Vagrant provider's gem into target
	@command -v gem >/dev/null || { echo "RubyGems is missing: install Debian's ruby" >&2; exit 1; }
	@mkdir -p target
	cd drivers/vagrant && gem build -o ../../target/vagrant-catalyst.gem vagrant-catalyst.gemspec

# What the page is built into is committed, so that nothing but tests and its own development takes Node.
ui-tools: setup-tests
	ui/tools

ui: ui-tools ## build the page at /ui into ui/dist, which is committed
	node ui/build.mjs

image: build ## build the bundled image lumen and make it warm, unless that is done
	$(SUDO) $(RELEASE)/catalyst-image build --store $(IMAGE_DIR)
	$(SUDO) guest-images/warm $(RELEASE) $(IMAGE_DIR)

demo: image ## from nothing to a container in a VM, each step with its time
	tests/demo $(RELEASE)

unit: build rspec go ## unit tests
	cargo test --release --workspace --exclude catalyst-tests
	$(WITH_GO) go test ./...

rspec: setup-tests gem ## tests of the Vagrant provider, without VMs
	cd drivers/vagrant && rspec

e2e: e2e-needs ## end-to-end tests on real VMs (root)
	@$(MAKE) e2e-run

e2e-needs: image setup-tests ui-tools machine-driver machine-tools docker-tools firewall-tools schemathesis
	cargo test --release -p catalyst-tests --no-run

e2e-run:
	@$(MAKE) -s place
	@tests/versions $(RELEASE)
	cargo test --release -p catalyst-tests -- --nocapture

versions: ## the clients and tools of docs/CLIENTS.md, as they are here
	@tests/versions $(RELEASE)

# The groups that start VMs. LAB_TIMEOUT and LAB_MEM are those of tests/lab/README.md.
KVM_GROUPS ?= instant snapshots faults full rounds crash access bad_input foreign settings hosts legacy daemons life user_data templates folders pair ports cpus many owner \
	containers container_clients container_faults docker_up pods
e2e-kvm: export LAB_TIMEOUT ?= 10800
e2e-kvm: export LAB_CPUS ?= 1
e2e-kvm: image firewall-tools ## groups of the end-to-end tests on engine kvm, in the lab (root)
	tests/lab/e2e '$(KVM_GROUPS)'

# What of them needs a genuine KVM and is quick.
e2e-lab: image
	tests/lab/sample

# The image is built by one processor at a time; fuzzing takes what the end-to-end tests leave while they wait.
test: lint licences build ## all tests, but for those that take hours
	@$(MAKE) -j2 unit image
	@$(MAKE) e2e-needs
	@$(MAKE) -j2 e2e-run fuzz-aside
	@$(MAKE) e2e-lab

# A daemon killed at every step, hundreds of rounds, and thousands of files in a folder, where `make test` tries some. CATALYST_TEST_CHECKS='words|others' has
# only those checks run whose name has such words.
test-long: image
	CATALYST_TEST_FULL=1 cargo test --release -p catalyst-tests --test e2e -- faults rounds folders --nocapture

test-full: test test-long e2e-kvm bench-monitor ## those too

# In the profile that all else is built in: what runs at build time is built once.
lint: setup go ui-tools ## formatting, clippy and vet; that ui/dist is what ui/src says
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets --quiet -- -D warnings
	@unformatted=$$($(WITH_GO) gofmt -l .); [ -z "$$unformatted" ] || { echo "not as gofmt writes it: $$unformatted" >&2; exit 1; }
	$(WITH_GO) go vet ./...
	ui/check

licences: setup go ## licences and advisories of all dependencies
	tests/licences

oci-checks: image firewall-tools go ## the OCI project's checks for runtimes, of ours and beside it of runc (root)
	tests/oci-checks $(RELEASE) $(IMAGE_DIR)

cri-checks: image firewall-tools go ## Kubernetes' checks for what runs its containers, of ours and beside it of runc (root)
	tests/firewall-tools $(CURDIR)/$(RELEASE)/cri-tools containernetworking-plugins nginx
	tests/cri-checks $(RELEASE) $(IMAGE_DIR)

fuzz: ## fuzz the monitor: TARGET=name for one, SECONDS=600 each
	vmm/fuzz/run $(or $(SECONDS),600) $(TARGET)

fuzz-short: ## every fuzz target of the monitor for 10 seconds
	vmm/fuzz/run $${FUZZ_SECONDS:-10}

fuzz-aside:
	@nice -n 10 $(MAKE) -s fuzz-short

bench: image firewall-tools ## the promises of docs/SPECIFICATION.md, measured
	cargo run --release -p catalyst-tests --bin bench -- $(if $(BENCH),'$(BENCH)')

bench-monitor: export LAB_TIMEOUT ?= 900
bench-monitor: image ## our monitor beside QEMU, in the lab (BENCH='boot restore block net')
	rustc --edition 2024 -O -C target-feature=+crt-static -o $(RELEASE)/guest-io tests/src/monitor/guest_io.rs
	tests/lab/run 'CATALYST_BIN=$$PWD/$(RELEASE) CATALYST_IMAGE_DIR=$(IMAGE_DIR) $(RELEASE)/bench-monitor $(BENCH)'

bench-kvm: export LAB_TIMEOUT ?= 3000
bench-kvm: export LAB_CPUS ?= 1
bench-kvm: image firewall-tools ## instant clone and containers on engine kvm, in the lab
	cargo build --release -p catalyst-tests
	tests/lab/run 'mkdir -p /run/worlds && TMPDIR=/run/worlds CATALYST_TEST_ENGINE=kvm CATALYST_BIN=$$PWD/$(RELEASE) CATALYST_IMAGE_DIR=$(IMAGE_DIR) $(RELEASE)/bench $(BENCH)'

lab: setup ## run CMD on an emulated machine with a genuine /dev/kvm
	tests/lab/run '$(CMD)'

# Units that are nobody's package's lie in /etc.
UNIT_DIR ?= /etc/systemd/system
COMPLETIONS := bash-completion/completions/catalyst zsh/site-functions/_catalyst fish/vendor_completions.d/catalyst.fish
INTO := $(DESTDIR)$(PREFIX)

install: image install-files ## install programs, units, completions and manual pages under PREFIX

install-files:
	$(SUDO) install -D -m 755 -t $(INTO)/bin $(RELEASE)/catalyst $(RELEASE)/catalyst-daemon $(RELEASE)/catalyst-oci
	$(SUDO) ln -sf catalyst $(INTO)/bin/appcatalyst
	$(SUDO) ln -sf catalyst-daemon $(INTO)/bin/appcatalyst-daemon
	$(SUDO) install -D -m 755 -t $(INTO)/lib/catalyst $(RELEASE)/catalyst-vmm $(RELEASE)/catalyst-image $(RELEASE)/catalyst-agent-static
	$(SUDO) install -D -m 644 -t $(DESTDIR)$(UNIT_DIR) daemon/catalyst@.service
	$(SUDO) sed -i 's|@PREFIX@|$(PREFIX)|' $(DESTDIR)$(UNIT_DIR)/catalyst@.service
	@pages=$$(mktemp -d) && trap "rm -r $$pages" EXIT && $(RELEASE)/catalyst-manual $$pages && cd $$pages && \
	  for page in man*/*; do $(SUDO) install -D -m 644 $$page $(INTO)/share/man/$$page; done
	@for place in $(COMPLETIONS); do shell=$${place%%-*}; shell=$${shell%%/*}; $(RELEASE)/catalyst completion $$shell | \
	  $(SUDO) install -D -m 644 /dev/stdin $(INTO)/share/$$place; done

uninstall: ## remove what install put there; VMs and images stay
	$(SUDO) rm -rf $(addprefix $(INTO)/bin/,catalyst catalyst-daemon catalyst-oci appcatalyst appcatalyst-daemon) $(INTO)/lib/catalyst \
	  $(DESTDIR)$(UNIT_DIR)/catalyst@.service $(addprefix $(INTO)/share/,$(COMPLETIONS))
	$(SUDO) find $(INTO)/share/man -regextype egrep -regex '.*/(app)?catalyst[a-z-]*\.[18]' -delete
	@# Folders that hold nothing any more; those of others are not empty.
	@cd $(INTO) && $(SUDO) rmdir -p --ignore-fail-on-non-empty bin lib share/man/man1 share/man/man8 \
	  $(addprefix share/,$(dir $(COMPLETIONS))) 2>/dev/null || true

DEBS ?= target/debs
deb: image ## build the Debian packages catalyst and catalyst-lumen into target/debs
	packaging/deb $(RELEASE) $(IMAGE_DIR) $(DEBS) catalyst catalyst-lumen

clean: ## remove what was built here; images stay
	cargo clean
