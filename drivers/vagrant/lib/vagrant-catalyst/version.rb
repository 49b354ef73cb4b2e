# frozen_string_literal: true

module VagrantPlugins
  module Catalyst
    VERSION = "0.1.0"
  end
end
