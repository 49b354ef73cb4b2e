# frozen_string_literal: true

module VagrantPlugins
  module Catalyst
    # What Vagrant's commands and other plugins ask of a machine.
    module Cap
      module_function

      # The guest's address, which is reached from the host and from other VMs.
      def public_address(machine)
        machine.ssh_info&.fetch(:host)
      end

      # @return [Hash{Integer=>Integer}] ports of the guest by ports of the host
      def forwarded_ports(machine)
        return {} if machine.id.nil?

        machine.provider.client.ports(machine.id).to_h { |port| [port["host_port"], port["guest_port"]] }
      end

      # @return [Hash{Integer=>String}] MAC addresses by the number of the NIC, from 1 on
      def nic_mac_addresses(machine)
        vm = machine.provider.vm
        vm.nil? ? {} : { 1 => vm["mac"] }
      end

      # @return [Array<String>] names, the oldest first
      def snapshot_list(machine)
        return [] if machine.id.nil?

        machine.provider.client.snapshots(machine.id).map { |snapshot| snapshot["name"] }
      end

      # Folders are mounted by the guest's agent, so nothing of them is for its fstab.
      def default_fstab_modification(_machine)
        false
      end
    end
  end
end
