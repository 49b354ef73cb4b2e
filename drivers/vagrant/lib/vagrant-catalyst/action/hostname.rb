# frozen_string_literal: true

require "vagrant-catalyst/action/step"
require "vagrant-catalyst/errors"

module VagrantPlugins
  module Catalyst
    module Action
      # Names the guest as the Vagrantfile says. The daemon names guests of templates for their VMs, which is
      # why VMs are called after their machines' host names; what is left to do is a name that is another
      # VM's, or has a domain.
      class SetHostname < Step
        # Run as root; ends at once where the guest has the name.
        SCRIPT = <<~'SH'
          [ "$(hostname)" = "$1" ] && { [ "$1" = "$2" ] || [ "$(hostname -f)" = "$2" ]; } && exit 0
          hostname "$1" && echo "$1" >/etc/hostname || exit 1
          names=$2; [ "$1" = "$2" ] || names="$2 $1"
          hosts=$(sed "/^127\.0\.1\.1[[:space:]]/d" /etc/hosts) &&
            printf "%s\n" "$hosts" "127.0.1.1 $names" >/etc/hosts
        SH

        def call(env)
          @app.call(env)
          machine = env[:machine]
          name = machine.config.vm.hostname
          return if name.nil? || !machine.config.vm.allow_hosts_modification

          env[:ui].info(I18n.t("vagrant.actions.vm.hostname.setting"))
          machine.provider.box_guest? ? by_guest(machine, name) : by_agent(machine, name)
        end

        private

        def by_guest(machine, name)
          machine.guest.capability(:change_host_name, name)
        end

        # Not by Vagrant's own way with Debian, which restarts network interfaces: here these are the agent's.
        def by_agent(machine, name)
          argv = ["sh", "-c", SCRIPT, "sh", name.split(".", 2).first, name]
          done = machine.provider.client.exec(machine.id, argv)
          return if done["exit_code"].zero?

          raise Errors::Hostname, name: name, reason: done["stderr"].to_s.strip
        end
      end
    end
  end
end
