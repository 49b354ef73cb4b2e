# frozen_string_literal: true

require "vagrant-catalyst/action/step"
require "vagrant-catalyst/errors"

module VagrantPlugins
  module Catalyst
    module Action
      # States in which there is, or soon will be, a guest to speak to.
      RUNS = %i[starting running].freeze

      # Puts the id of the machine's state into `env[:result]`, for `Call`.
      class ReadState < Step
        def call(env)
          env[:result] = env[:machine].state.id
          @app.call(env)
        end
      end

      # Refuses what needs a guest where there is none.
      class MustRun < Step
        def call(env)
          state = env[:machine].state
          raise Vagrant::Errors::VMNotCreatedError if state.id == :not_created
          raise Errors::NotRunning, state: state.short_description unless RUNS.include?(state.id)

          @app.call(env)
        end
      end

      # Says a thing, by its key among the texts.
      class Tell < Step
        def initialize(app, env, key)
          super(app, env)
          @key = key
        end

        def call(env)
          env[:ui].info(I18n.t(@key, name: env[:machine].name))
          @app.call(env)
        end
      end

      # Names what the Vagrantfile asks for and Catalyst has not, so that nobody looks for it in vain.
      class WarnOfUnsupported < Step
        def call(env)
          lacking(env[:machine].config.vm).each do |what|
            env[:ui].warn(I18n.t("vagrant_catalyst.lacks.#{what}"))
          end
          @app.call(env)
        end

        private

        def lacking(config)
          kinds = config.networks.map(&:first)
          {
            networks: kinds.include?(:private_network) || kinds.include?(:public_network),
            guest_ip: config.networks.any? { |kind, options| kind == :forwarded_port && options[:guest_ip] },
            disks: !config.disks.empty?,
            cloud_init: !config.cloud_init_configs.empty?,
            clone: !config.clone.nil?
          }.select { |_, asked| asked }.keys
        end
      end
    end
  end
end
