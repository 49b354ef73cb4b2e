# frozen_string_literal: true

require "pathname"

module VagrantPlugins
  # The provider `catalyst`: VMs of a Catalyst daemon.
  module Catalyst
    # The gem's folder.
    def self.source_root
      @source_root ||= Pathname.new(File.expand_path("..", __dir__))
    end
  end
end

require "vagrant-catalyst/plugin"
