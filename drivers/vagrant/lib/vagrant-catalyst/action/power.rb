# frozen_string_literal: true

require "vagrant-catalyst/action/step"
require "vagrant-catalyst/errors"

module VagrantPlugins
  module Catalyst
    module Action
      # Starts the VM, or lets it go on; one that runs is left alone.
      class PowerOn < Step
        def call(env)
          machine = env[:machine]
          words, operation = {
            running: nil, starting: nil,
            suspended: ["vagrant.actions.vm.resume.resuming", "on"],
            paused: ["vagrant.actions.vm.resume.unpausing", "unpause"]
          }.fetch(machine.state.id, ["vagrant.actions.vm.boot.booting", "on"])
          unless operation.nil?
            env[:ui].info(I18n.t(words))
            machine.provider.client.power(machine.id, operation)
          end
          @app.call(env)
        end
      end

      # Switches the VM off: by its guest, unless `env[:force_halt]` is set, the guest does not do it in time
      # or there is none that could.
      class PowerOff < Step
        # How long the daemon waits for a guest, in seconds; its answer may take a little more.
        DAEMON_WAITS = 50

        def call(env)
          @machine = env[:machine]
          @ui = env[:ui]
          case @machine.state.id
          when :stopped then @ui.info(I18n.t("vagrant_catalyst.is_off"))
          when :suspended
            @ui.info(I18n.t("vagrant.actions.vm.discard_state.discarding"))
            power("off")
          else env[:force_halt] ? force : gracefully
          end
          @app.call(env)
        end

        private

        def gracefully
          power("unpause") if @machine.state.id == :paused
          @ui.output(I18n.t("vagrant.actions.vm.halt.graceful"))
          power("shutdown", patience)
        rescue Errors::Slow
          force
        rescue Errors::Api => error
          raise if error.code != "guest_timeout"

          @ui.warn(error.message)
          force
        end

        # The daemon takes `off` also while it waits for the guest.
        def force
          @ui.info(I18n.t("vagrant.actions.vm.halt.force"))
          power("off")
        end

        def patience
          limit = @machine.config.vm.graceful_halt_timeout
          limit < DAEMON_WAITS ? limit : DAEMON_WAITS * 2
        end

        def power(operation, *timeout)
          @machine.provider.client.power(@machine.id, operation, *timeout)
        end
      end

      # Writes memory and devices to disk.
      class Suspend < Step
        def call(env)
          machine = env[:machine]
          if %i[running paused].include?(machine.state.id)
            env[:ui].info(I18n.t("vagrant.actions.vm.suspend.suspending"))
            machine.provider.client.power(machine.id, "suspend")
          else
            env[:ui].info(I18n.t("vagrant.commands.common.vm_not_running"))
          end
          @app.call(env)
        end
      end
    end
  end
end
