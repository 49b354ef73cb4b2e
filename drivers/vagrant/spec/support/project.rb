# frozen_string_literal: true

require "tmpdir"

# A guest that can be reached as long as its machine runs, and does all that it is told.
class WillingGuest < Vagrant.plugin("2", :communicator)
  def self.match?(_machine)
    true
  end

  def initialize(machine)
    super
    @machine = machine
  end

  def ready?
    !@machine.ssh_info.nil?
  end

  def wait_for_ready(_timeout)
    ready?
  end

  def execute(_command, _options = nil)
    0
  end

  def sudo(_command, _options = nil)
    0
  end

  def test(_command, _options = nil)
    true
  end
end

# Vagrant waits at least a second for a machine, with threads that it then kills wherever they are. These
# machines need no time.
module Haste
  def call(env)
    state = env[:machine].state.id
    raise Vagrant::Errors::VMBootBadState, valid: @states, invalid: state unless @states.include?(state)
    raise Vagrant::Errors::VMBootTimeout unless env[:machine].communicate.wait_for_ready(1)

    @app.call(env)
  end
end
Vagrant::Action::Builtin::WaitForCommunicator.prepend(Haste)

# Brings the guest above into Vagrant.
class WillingGuestPlugin < Vagrant.plugin("2")
  name "willing guest"
  communicator(:willing) { WillingGuest }
end

# A folder with a Vagrantfile, and Vagrant itself working in it, without a process of its own.
class Project
  UI = Class.new(Vagrant::UI::Silent) do
    class << self
      attr_accessor :lines
    end
    %i[ask detail warn error info output success].each do |kind|
      define_method(kind) { |message, *_| self.class.lines << "#{kind}: #{message}" }
    end
  end

  attr_reader :folder

  def initialize(daemon)
    @daemon = daemon
    @root = Dir.mktmpdir("vagrant-catalyst-")
    @folder = File.join(@root, "shop")
    Dir.mkdir(@folder)
    @home = Pathname.new(@root).join("home")
    @home.mkdir
    UI.lines = []
  end

  def remove
    FileUtils.rm_rf(@root)
  end

  # What Vagrant said.
  def lines
    UI.lines
  end

  # Writes the Vagrantfile: what stands in `config`, and in the provider's block.
  def vagrantfile(provider = "", config: 'config.vm.synced_folder ".", "/vagrant", disabled: true')
    File.write(File.join(@folder, "Vagrantfile"), <<~RUBY)
      Vagrant.configure("2") do |config|
        config.vm.communicator = :willing
        config.vm.guest = :linux
        config.vm.provider "catalyst" do |catalyst|
          catalyst.host = #{@daemon.host.inspect}
          #{provider}
        end
        #{config}
      end
    RUBY
  end

  # A machine as a new process of Vagrant's sees it.
  def machine(name = :default)
    environment.machine(name, :catalyst)
  end

  def environment
    Vagrant::Environment.new(cwd: @folder, home_path: @home, ui_class: UI)
  end

  # Does an action and gives the machine.
  def run(action, name = :default, **options)
    machine = machine(name)
    machine.action(action, options)
    machine
  end
end
