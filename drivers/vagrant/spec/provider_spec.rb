# frozen_string_literal: true

RSpec.describe "the provider" do
  include_context "with a daemon"

  errors = VagrantPlugins::Catalyst::Errors

  before do
    project.vagrantfile('catalyst.id = "web1"')
    project.run(:up)
  end

  it "has the daemon's states under the names that Vagrant and plugins know" do
    {
      "powered off" => :stopped, "powering on" => :starting, "powered on" => :running,
      "powering off" => :stopping, "suspending" => :suspending, "suspended" => :suspended,
      "paused" => :paused, "blocked" => :blocked,
      "dancing" => :unknown
    }.each do |word, id|
      vm["state"] = word
      state = project.machine.state
      expect([state.id, state.short_description]).to eq([id, word])
      expect(state.long_description).to include("web1")
    end
  end

  it "says why a VM is as it is" do
    vm.merge!("state" => "blocked", "reason" => "Its file has no disk.")
    expect(project.machine.state.long_description).to end_with("Its file has no disk.")
  end

  it "forgets a VM that vanished, and can make another" do
    daemon.vms.clear
    machine = project.machine
    expect(machine.state.id).to eq(:not_created)
    expect(machine.id).to be_nil
    expect(project.run(:up).state.id).to eq(:running)
  end

  it "does not forget a VM because another daemon does not know it" do
    gone = daemon.vms.dup
    daemon.vms.clear
    daemon.state_dir = "/elsewhere"
    expect { project.machine }.to raise_error(errors::OtherDaemon, %r{/state, this one /elsewhere})
    daemon.state_dir = "/state"
    daemon.vms.merge!(gone)
    expect(project.machine.state.id).to eq(:running)
  end

  it "keeps the machine where no daemon answers, and says so" do
    daemon.close
    expect { project.machine }.to raise_error(errors::NoDaemon)
    id = File.join(project.folder, ".vagrant/machines/default/catalyst/id")
    expect(File.read(id)).to eq("web1")
  end

  it "logs in with the daemon's user and key, and not before it can" do
    info = project.machine.ssh_info
    expect(info.slice(:host, :port, :username)).to eq(host: "10.208.0.10", port: 22, username: "catalyst")
    expect(info[:private_key_path]).to eq(["/state/ssh/id_ed25519"])
    vm["state"] = "powered off"
    expect(project.machine.ssh_info).to be_nil
  end

  it "has the capabilities that commands and plugins ask for" do
    provider = project.machine.provider
    expect(provider.capability(:public_address)).to eq("10.208.0.10")
    expect(provider.capability(:nic_mac_addresses)).to eq(1 => "02:ca:00:00:00:01")
    vm[:ports] << { "host_port" => 8080, "guest_port" => 80, "protocol" => "tcp" }
    expect(provider.capability(:forwarded_ports)).to eq(8080 => 80)
    vm[:snapshots] << { name: "clean", state: "powered on" }
    expect(provider.capability(:snapshot_list)).to eq(["clean"])
  end

  it "has nothing of a machine that was not created" do
    project.run(:destroy, force_confirm_destroy: true)
    provider = project.machine.provider
    names = %i[public_address nic_mac_addresses forwarded_ports snapshot_list]
    expect(names.map { |name| provider.capability(name) }).to eq([nil, {}, {}, []])
  end

  it "refuses what it has not, by Vagrant's own words" do
    expect { project.run(:package) }.to raise_error(Vagrant::Errors::UnimplementedProviderAction)
  end
end
