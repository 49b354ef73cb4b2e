# frozen_string_literal: true

RSpec.describe "forwarded ports" do
  include_context "with a daemon"

  errors = VagrantPlugins::Catalyst::Errors

  def vagrantfile(*ports)
    lines = [%(config.vm.synced_folder ".", "/vagrant", disabled: true)]
    lines += ports.map { |port| "config.vm.network :forwarded_port, #{port}" }
    project.vagrantfile("", config: lines.join("\n"))
  end

  def up(action = :up)
    project.run(action)
  end

  def forwarded
    names = %w[host_address host_port guest_port protocol]
    vm[:ports].map { |port| port.values_at(*names) }
  end

  it "are asked for before the machine starts, on loopback unless the Vagrantfile says otherwise" do
    vagrantfile("guest: 80, host: 8000", 'guest: 53, host: 5353, protocol: "udp", host_ip: "0.0.0.0"')
    id = up.id
    expect(forwarded).to eq([["127.0.0.1", 8000, 80, "tcp"], ["0.0.0.0", 5353, 53, "udp"]])
    ports = "POST /v1/vms/#{id}/ports"
    expect(daemon.changes).to eq(["POST /v1/vms", ports, ports, "POST /v1/vms/#{id}/power"])
  end

  it "are not made for what Vagrant adds by itself: the guest's own address is reached" do
    vagrantfile
    up
    expect(forwarded).to be_empty
    vagrantfile('guest: 22, host: 2022, id: "ssh"')
    up(:reload)
    expect(forwarded).to eq([["127.0.0.1", 2022, 22, "tcp"]])
  end

  it "take another port where theirs is taken and they may, and keep it" do
    daemon.taken_ports.push(8000, 2200)
    vagrantfile("guest: 80, host: 8000, auto_correct: true")
    up
    expect(forwarded).to eq([["127.0.0.1", 2201, 80, "tcp"]])
    expect(project.lines).to include(match(/80 => 8000. Now on port 2201/))
    daemon.taken_ports.clear
    up(:reload)
    expect(forwarded).to eq([["127.0.0.1", 2201, 80, "tcp"]])
  end

  it "are refused with the owner's name where they may not, before anything starts" do
    daemon.taken_ports << 8000
    vagrantfile("guest: 80, host: 8000")
    expect { up }.to raise_error(errors::PortTaken, /used by nginx \(77\).*auto_correct: true/m)
    expect(vm["state"]).to eq("powered off")
  end

  it "say so where none is free" do
    daemon.taken_ports.push(8000, *2200..2250)
    vagrantfile("guest: 80, host: 8000, auto_correct: true")
    expect { up }.to raise_error(errors::NoPort, /Neither port 8000 nor/)
  end

  it "do not clash when two machines come up at once" do
    lines = <<~RUBY
      config.vm.synced_folder ".", "/vagrant", disabled: true
      config.vm.network :forwarded_port, guest: 80, host: 8000, auto_correct: true
      config.vm.define "a"
      config.vm.define "b"
    RUBY
    project.vagrantfile("", config: lines)
    env = project.environment
    env.batch { |batch| %i[a b].each { |name| batch.action(env.machine(name, :catalyst), :up) } }
    ports = daemon.vms.values.flat_map { |vm| vm[:ports].map { |port| port["host_port"] } }
    expect(ports).to contain_exactly(8000, 2200)
  end

  it "follow the Vagrantfile at a reload, and leave what is not its own" do
    vagrantfile("guest: 80, host: 8000", "guest: 81, host: 8001")
    up
    vm[:ports] << { "host_port" => 9, "guest_port" => 9, "protocol" => "tcp", "host_address" => "127.0.0.1" }
    vagrantfile("guest: 8, host: 8000", "guest: 81, host: 8001", "guest: 82, host: 8002, disabled: true")
    up(:reload)
    expect(forwarded.map { |port| port[1, 2] }).to contain_exactly([8000, 8], [8001, 81], [9, 9])
    vagrantfile
    up(:reload)
    expect(forwarded.map { |port| port[1] }).to eq([9])
  end

  it "cannot be had of a daemon that is too old, which says so" do
    daemon.lacks << "ports"
    vagrantfile("guest: 80, host: 8000")
    expect { up }.to raise_error(errors::TooOld, /no forwarded ports/)
    vagrantfile
    expect(up(:reload).state.id).to eq(:running)
  end
end
