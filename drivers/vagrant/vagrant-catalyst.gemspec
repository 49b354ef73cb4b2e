# frozen_string_literal: true

require_relative "lib/vagrant-catalyst/version"

Gem::Specification.new do |spec|
  spec.name = "vagrant-catalyst"
  spec.version = VagrantPlugins::Catalyst::VERSION
  spec.summary = "Vagrant provider for Catalyst VMs"
  spec.description = "Makes and drives Catalyst VMs from a Vagrantfile, through the REST API of catalyst-daemon."
  spec.authors = ["The Catalyst project"]
  spec.license = "Apache-2.0"
  spec.required_ruby_version = ">= 3.0"
  # Vagrant brings all that is needed: a plugin that names other gems cannot be installed without a network.
  spec.files = Dir.chdir(__dir__) { Dir["lib/**/*.rb", "locales/*.yml", "README.md"] }
  spec.require_paths = ["lib"]
end
