# frozen_string_literal: true

require "securerandom"

require "vagrant-catalyst/action/step"
require "vagrant-catalyst/box"
require "vagrant-catalyst/errors"

module VagrantPlugins
  module Catalyst
    module Action
      # Makes the machine's VM: from a box, as a clone of another, or from a template.
      class Create < Step
        def call(env)
          @env = env
          @machine = env[:machine]
          @config = @machine.provider_config
          @machine.id = make
          @machine.provider.note_daemon
          @app.call(env)
        end

        # A machine that was interrupted on its way up is taken back, as Vagrant's own providers do.
        def recover(env)
          return if !env[:destroy_on_error] || env["vagrant.error"].is_a?(Vagrant::Errors::VagrantError)
          return if env[:machine].id.nil?

          destroy = env.dup
          destroy.update(config_validate: false, force_confirm_destroy: true, raw_action_name: :destroy,
                         action_name: :machine_action_destroy)
          env[:action_runner].run(Action.action_destroy, destroy)
        end

        private

        # @return [String] the VM's id
        def make
          if @machine.box
            from_box
          elsif @config.clone_from
            cloned
          else
            tell("creating", template: @config.template || "lumen")
            named { |id| client.create(request(id)) }
          end
        end

        def request(id)
          {
            id: id, name: display_name, template: @config.template, tags: @config.all_tags,
            cpus: @config.cpus, memory_mib: @config.memory, disk_gib: @config.disk_size
          }.compact
        end

        def from_box
          tell("importing", box: @machine.box.name)
          box = Box.new(@machine.box, @machine.data_dir.join("box"))
          vmx = box.copy(display_name)
          named do |id|
            tags = @config.all_tags.join(",")
            client.register(id: id, name: display_name, tag: tags, sourceReference: vmx.to_s)
          end
        rescue Vagrant::Errors::VagrantError
          box&.remove
          raise
        end

        # CPUs and memory of a parent that runs are the clone's, so they are not asked for here.
        def cloned
          parent = @machine.provider.parent_machine
          return clone_of(@config.clone_from) if parent.nil?

          wait_for(parent)
          made = nil
          borrow(parent) do
            raise Errors::NoParent, name: parent.name if parent.state.id == :not_created

            made = clone_of(parent.id)
          end
          made
        end

        # A parent that comes up in the same `vagrant up` has a thread of its own, which Vagrant marks with
        # it.
        def wait_for(parent)
          thread = Thread.list.find do |other|
            machine = other[:machine]
            machine.is_a?(Vagrant::Machine) && machine.data_dir == parent.data_dir
          end
          return if thread.nil?

          tell("waiting", parent: parent.name)
          thread.join
          raise Errors::NoParent, name: parent.name if thread[:error]
        end

        # Another process may be at work with it: it is waited for as well.
        def borrow(parent, &block)
          parent.action(:lend, borrow: block)
        rescue Vagrant::Errors::MachineActionLockedError
          # Vagrant has no way to wait for a machine but to try.
          sleep 1
          retry
        end

        def clone_of(parent)
          tell("cloning", parent: parent)
          named { |id| client.create(id: id, parent: parent, tags: @config.all_tags) }
        end

        # Makes a VM under the first of the possible ids that is free.
        def named
          fallback = generated_id
          wished = @config.id || label(@machine.config.vm.hostname)
          begin
            yield wished || fallback
            wished || fallback
          rescue Errors::Api => error
            raise if wished.nil? || @config.id || !taken?(error, wished)

            wished = nil
            retry
          end
        end

        # The AppCatalyst API tells it only by a number that has other meanings as well.
        def taken?(error, id)
          return true if error.code == "vm_exists"

          error.code == "409" && client.vm(id)
        rescue Errors::Api
          false
        end

        def label(hostname)
          name = hostname.to_s.split(".", 2).first
          name if name && Config::ID.match?(name)
        end

        # Folder and machine, as far as an id can have them, and something that no other has.
        def generated_id
          folder = @machine.env.root_path.basename.to_s
          words = @machine.name == :default ? [folder] : [folder, @machine.name.to_s]
          words = words.map { |word| word.downcase.gsub(/[^a-z0-9]+/, "-").gsub(/\A-+|-+\z/, "") }
          [*words.reject(&:empty?).map { |word| word[0, 24].chomp("-") }, SecureRandom.hex(3)].join("-")
        end

        def display_name
          "Vagrant: #{@machine.env.root_path.basename} #{@machine.name}"
        end

        def tell(key, **values)
          @env[:ui].info(I18n.t("vagrant_catalyst.#{key}", **values))
        end

        def client
          @machine.provider.client
        end
      end

      # Does what another machine wants of this one, while this one is locked.
      class Lend < Step
        def call(env)
          env[:borrow].call
          @app.call(env)
        end
      end
    end
  end
end
