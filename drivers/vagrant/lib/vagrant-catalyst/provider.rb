# frozen_string_literal: true

require "vagrant"

require "vagrant-catalyst/action"
require "vagrant-catalyst/client"

module VagrantPlugins
  module Catalyst
    # A machine of Vagrant's as a VM of the daemon's. The machine's id is the VM's.
    class Provider < Vagrant.plugin("2", :provider)
      # The daemon's words, and the ids by which Vagrant and its plugins know states.
      STATES = {
        "powered off" => :stopped, "powering on" => :starting, "powered on" => :running,
        "powering off" => :stopping, "suspending" => :suspending, "suspended" => :suspended,
        "paused" => :paused, "blocked" => :blocked
      }.freeze
      # Codes of a guest that is not ready for a login.
      NOT_YET = %w[guest_not_ready wrong_state vm_not_found].freeze
      # Where, in the machine's data folder, the daemon is noted that has the VM.
      DAEMON_FILE = "catalyst_daemon"

      def initialize(machine)
        super
        @machine = machine
      end

      def action(name)
        name = "action_#{name}"
        Action.public_send(name) if Action.respond_to?(name)
      end

      # The daemon that the Vagrantfile names now.
      def client
        Client.new(@machine.provider_config.host)
      end

      # The VM as the daemon tells it.
      #
      # @return [Hash, nil] nil if there is none, or none any more
      def vm
        client.vm(@machine.id) if @machine.id
      rescue Errors::Api => error
        raise if error.code != "vm_not_found"

        gone_for_good
      end

      # Notes the daemon that has made the machine's VM.
      def note_daemon
        @machine.data_dir.join(DAEMON_FILE).write(client.state_dir)
      end

      def state
        vm = self.vm
        return not_created if vm.nil?

        id = STATES.fetch(vm["state"], :unknown)
        long = I18n.t("vagrant_catalyst.states.#{id}", id: vm["id"])
        long = "#{long} #{vm["reason"]}" if vm["reason"]
        Vagrant::MachineState.new(id, vm["state"].to_s, long)
      end

      # What of the machine is from a box has the box's user and key, and Vagrant replaces an insecure one.
      # Guests of templates take the daemon's key, at every start anew.
      def ssh_info
        return if @machine.id.nil?
        return { host: client.address(@machine.id), port: 22 } if box_guest?

        login = client.ssh(@machine.id)
        {
          host: login["address"], port: login["port"],
          username: login["user"], private_key_path: [login["key_file"]]
        }
      rescue Errors::Api => error
        raise unless NOT_YET.include?(error.code)

        nil
      end

      # Whether the guest is a box's, without Catalyst's agent.
      def box_guest?
        !@machine.config.vm.box.to_s.empty?
      end

      # The machine of this Vagrantfile that this one is a clone of.
      #
      # @return [Vagrant::Machine, nil] nil if it is no clone, or one of another VM
      def parent_machine
        name = @machine.provider_config.clone_from&.to_sym
        @machine.env.machine(name, @machine.provider_name) if @machine.env.machine_names.include?(name)
      end

      def to_s
        "Catalyst (#{@machine.id || "new VM"})"
      end

      private

      def not_created
        id = Vagrant::MachineState::NOT_CREATED_ID
        Vagrant::MachineState.new(id, "not created", I18n.t("vagrant_catalyst.states.not_created"))
      end

      # Another daemon at this address does not know the VM either; the machine must not be forgotten for
      # that.
      def gone_for_good
        file = @machine.data_dir.join(DAEMON_FILE)
        noted = file.file? ? file.read : nil
        now = client.state_dir
        return if noted.nil? || noted == now

        host = @machine.provider_config.host
        raise Errors::OtherDaemon, id: @machine.id, host: host, noted: noted, now: now
      end
    end
  end
end
