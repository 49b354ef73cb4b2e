# frozen_string_literal: true

require "vagrant-catalyst/action/step"
require "vagrant-catalyst/errors"
require "vagrant-catalyst/synced_folder"

module VagrantPlugins
  module Catalyst
    module Action
      # Gives the VM the CPUs and the memory that the Vagrantfile says now.
      class Resize < Step
        def call(env)
          machine = env[:machine]
          vm = machine.provider.vm
          wanted = { cpus: machine.provider_config.cpus, memory_mib: machine.provider_config.memory }.compact
          changed = wanted.reject { |name, value| vm[name.to_s] == value }
          unless changed.empty?
            machine.provider.client.update(machine.id, changed)
            env[:ui].warn(I18n.t("vagrant_catalyst.next_start")) if vm["state"] != "powered off"
          end
          is, wanted = vm["disk_gib"], machine.provider_config.disk_size
          env[:ui].warn(I18n.t("vagrant_catalyst.disk_stays", is: is)) unless [nil, is].include?(wanted)
          @app.call(env)
        end
      end

      # Spares Vagrant its search for the kind of guest, which takes some thirty commands by SSH: lumen is
      # Debian.
      class KnowGuest < Step
        def call(env)
          machine = env[:machine]
          config = machine.config.vm
          config.guest = :debian if config.guest.nil? && machine.provider.vm&.fetch("template") == "lumen"
          @app.call(env)
        end
      end

      # Takes away the synced folders that have left the Vagrantfile. Vagrant asks a kind of folders to clean
      # up only while the Vagrantfile has some of it.
      class ForgetFolders < Step
        def call(env)
          SyncedFolder.new.forget_earlier(env[:machine])
          @app.call(env)
        end
      end

      # Deletes the VM with all that is its own.
      class Destroy < Step
        def call(env)
          machine = env[:machine]
          halt(env) unless env.fetch(:force_halt, true)
          env[:ui].info(I18n.t("vagrant.actions.vm.destroy.destroying"))
          delete(machine)
          machine.id = nil
          @app.call(env)
        end

        private

        def halt(env)
          PowerOff.new(->(_) {}, env).call(env)
        end

        def delete(machine)
          machine.provider.client.delete(machine.id)
        rescue Errors::Api => error
          # Somebody was faster.
          raise if error.code != "vm_not_found"
        end
      end
    end
  end
end
