# frozen_string_literal: true

require "vagrant"

module VagrantPlugins
  module Catalyst
    # What can go wrong; the texts are in `locales/en.yml`.
    module Errors
      # The base of all.
      class Error < Vagrant::Errors::VagrantError
        error_namespace("vagrant_catalyst.errors")
      end

      # Nobody listens at the daemon's address.
      class NoDaemon < Error
        error_key(:no_daemon)
      end

      # Something else than Catalyst listens there.
      class NotCatalyst < Error
        error_key(:not_catalyst)
      end

      # The daemon was too slow.
      class Slow < Error
        error_key(:slow)
      end

      # The connection broke while the answer was awaited.
      class Lost < Error
        error_key(:lost)
      end

      # The daemon said no: its words as they are.
      class Api < Error
        error_key(:api)

        # The stable word of the daemon's error, such as `vm_not_found`; a number where it is of the
        # AppCatalyst API.
        def code
          extra_data[:code]
        end
      end

      # The daemon is of a version that lacks what is needed.
      class TooOld < Error
        error_key(:too_old)
      end

      # The VM is not at this daemon, and it is not the daemon that made it.
      class OtherDaemon < Error
        error_key(:other_daemon)
      end

      # The machine has no guest to speak to now.
      class NotRunning < Error
        error_key(:not_running)
      end

      # A port of the host is taken, and the Vagrantfile allows no other.
      class PortTaken < Error
        error_key(:port_taken)
      end

      # No port of `usable_port_range` is free.
      class NoPort < Error
        error_key(:no_port)
      end

      # The machine that is to be cloned is not there.
      class NoParent < Error
        error_key(:no_parent)
      end

      # The box cannot be used.
      class BadBox < Error
        error_key(:bad_box)
      end

      # An owner or group of a synced folder that the guest does not know.
      class NoSuchUser < Error
        error_key(:no_such_user)
      end

      # The guest did not take its host name.
      class Hostname < Error
        error_key(:hostname)
      end
    end
  end
end
