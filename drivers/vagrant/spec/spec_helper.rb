# frozen_string_literal: true

# Vagrant's own code prints warnings of Ruby's.
$VERBOSE = nil

require "fileutils"
require "tmpdir"

home = Dir.mktmpdir("vagrant-catalyst-home-")
at_exit { FileUtils.rm_rf(home) }
ENV["VAGRANT_HOME"] = home
ENV["VAGRANT_CHECKPOINT_DISABLE"] = "1"
# No other plugin is looked for, which costs a third of a second for each machine.
ENV["VAGRANT_DISABLE_PLUGIN_INIT"] = "1"
ENV.delete("CATALYST_HOST")

$LOAD_PATH.unshift(File.expand_path("../lib", __dir__))
require "vagrant"
require "vagrant-catalyst"
require "vagrant-catalyst/errors"

require_relative "support/fake_daemon"
require_relative "support/project"

RSpec.configure do |config|
  config.disable_monkey_patching!
end

# A daemon, and a project whose machines are its VMs.
RSpec.shared_context "with a daemon" do
  let(:daemon) { FakeDaemon.new }
  let(:project) { Project.new(daemon) }

  after do
    project.remove
    daemon.close
  end

  def vm
    daemon.vms.values.first
  end
end
