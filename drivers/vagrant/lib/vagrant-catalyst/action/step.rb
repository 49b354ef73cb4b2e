# frozen_string_literal: true

module VagrantPlugins
  module Catalyst
    module Action
      # A link of a chain of middleware: it does its part, and has the next do theirs.
      class Step
        def initialize(app, _env)
          @app = app
        end
      end
    end
  end
end
