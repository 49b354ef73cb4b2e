# frozen_string_literal: true

require "json"

require "vagrant-catalyst/action/step"
require "vagrant-catalyst/errors"

module VagrantPlugins
  module Catalyst
    module Action
      # Forwards ports of the host, as the Vagrantfile says now. The daemon keeps them for the VM, and is the
      # one that knows which are taken: of two machines that come up at once, both ask it, and the second
      # takes another port if it may (`auto_correct`).
      class ForwardPorts < Step
        # The ports that Vagrant has forwarded, in the machine's data folder: others of the VM are somebody
        # else's.
        FILE = "catalyst_ports"
        LOOPBACK = "127.0.0.1"
        # What Vagrant adds by itself to reach guests: here it reaches them by their address.
        OWN_SSH = { id: "ssh", guest: 22, host: 2222, host_ip: LOOPBACK }.freeze

        def call(env)
          @machine = env[:machine]
          @ui = env[:ui]
          forward
          @app.call(env)
        end

        private

        def forward
          wanted = self.wanted
          noted = read_note
          return if wanted.empty? && noted.empty?

          present = client.ports(@machine.id)
          kept = wanted.map { |options| kept(present, noted, options) }
          now = kept.compact.map { |port| key(port) }
          take_away(noted - now, present)
          @ui.output(I18n.t("vagrant.actions.vm.forward_ports.forwarding")) unless wanted.empty?
          wanted.zip(kept).each do |options, port|
            port ||= open(options, wanted)
            write_note(now |= [key(port)])
            options[:host] = port["host_port"]
            tell(port)
          end
          write_note(now)
        end

        # The forwarded ports of the Vagrantfile, as Vagrant has them.
        def wanted
          ports = @machine.config.vm.networks.select { |kind, _| kind == :forwarded_port }.map(&:last)
          ports.reject { |options| options[:disabled] || OWN_SSH <= options }
        end

        # The port that is forwarded already: as asked for, or corrected at an earlier start.
        def kept(present, noted, options)
          asked = request(options, options[:host])
          same = present.select do |port|
            port["guest_port"] == asked[:guest_port] && port["protocol"] == asked[:protocol] &&
              port["host_address"] == asked.fetch(:host_address, LOOPBACK)
          end
          same.find { |port| port["host_port"] == options[:host] } ||
            (same.find { |port| noted.include?(key(port)) } if options[:auto_correct])
        end

        def take_away(gone, present)
          present.select { |port| gone.include?(key(port)) }.each do |port|
            client.delete_port(@machine.id, port["host_port"], port["protocol"])
          end
        end

        def open(options, wanted)
          asked = options[:host]
          others = wanted.map { |other| other[:host] }
          spare = options[:auto_correct] ? @machine.config.vm.usable_port_range.to_a - others : []
          [asked, *spare].each do |host_port|
            port = try(options, host_port)
            next if port.nil?

            corrected(options, asked, host_port) if host_port != asked
            return port
          end
          raise Errors::NoPort, guest_port: options[:guest], host_port: asked
        end

        # @return [Hash, nil] nil if the port is taken and another may be tried
        def try(options, host_port)
          client.add_port(@machine.id, request(options, host_port))
        rescue Errors::Api => error
          raise if error.code != "port_taken"
          raise Errors::PortTaken, reason: error.message unless options[:auto_correct]

          nil
        end

        def request(options, host_port)
          address = options[:host_ip].to_s.empty? ? nil : options[:host_ip]
          {
            host_port: host_port, guest_port: options[:guest], protocol: options[:protocol] || "tcp",
            host_address: address
          }.compact
        end

        def corrected(options, asked, host_port)
          ports = { guest_port: options[:guest], host_port: asked, new_port: host_port }
          @ui.info(I18n.t("vagrant.actions.vm.forward_ports.fixed_collision", **ports))
        end

        def tell(port)
          ports = { guest: port["guest_port"], host: port["host_port"], address: port["host_address"] }
          @ui.detail(I18n.t("vagrant_catalyst.forwarded", protocol: port["protocol"], **ports))
        end

        def key(port)
          "#{port["host_port"]}-#{port["protocol"]}"
        end

        def read_note
          file = @machine.data_dir.join(FILE)
          file.file? ? JSON.parse(file.read) : []
        rescue JSON::ParserError
          []
        end

        def write_note(keys)
          @machine.data_dir.join(FILE).write(JSON.generate(keys))
        end

        def client
          @machine.provider.client
        end
      end
    end
  end
end
