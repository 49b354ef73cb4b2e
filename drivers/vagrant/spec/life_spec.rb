# frozen_string_literal: true

RSpec.describe "a machine's life" do
  include_context "with a daemon"

  errors = VagrantPlugins::Catalyst::Errors

  it "begins with a VM of what the Vagrantfile says" do
    project.vagrantfile(<<~RUBY)
      catalyst.cpus = 2
      catalyst.memory = "2G"
      catalyst.disk_size = "100GB"
      catalyst.template = "lumen"
      catalyst.tags = ["shop"]
    RUBY
    machine = project.run(:up)
    expect(machine.id).to match(/\Ashop-\h{6}\z/)
    expect(daemon.body_of("POST", "/v1/vms")).to eq(
      "id" => machine.id, "name" => "Vagrant: shop default", "template" => "lumen",
      "tags" => %w[vagrant shop], "cpus" => 2, "memory_mib" => 2048, "disk_gib" => 100
    )
    expect(daemon.changes).to eq(["POST /v1/vms", "POST /v1/vms/#{machine.id}/power"])
    expect(machine.state.id).to eq(:running)
  end

  it "is known to be Debian where it is lumen, unless the Vagrantfile says otherwise" do
    project.vagrantfile("", config: <<~RUBY)
      config.vm.synced_folder ".", "/vagrant", disabled: true
      config.vm.guest = nil
    RUBY
    expect(project.run(:up).config.vm.guest).to eq(:debian)
    vm["template"] = "other"
    expect(project.run(:up).config.vm.guest).to be_nil
    project.vagrantfile
    expect(project.run(:reload).config.vm.guest).to eq(:linux)
  end

  it "asks for nothing that the Vagrantfile does not say" do
    project.vagrantfile
    id = project.run(:up).id
    expect(daemon.body_of("POST", "/v1/vms").keys).to eq(%w[id name tags])
    expect(vm["id"]).to eq(id)
  end

  it "changes nothing when it is brought up again" do
    project.vagrantfile("catalyst.cpus = 2")
    project.run(:up)
    before = daemon.changes.length
    project.run(:up)
    expect(daemon.changes.length).to eq(before)
  end

  it "goes from state to state" do
    project.vagrantfile
    actions = %i[up suspend resume halt up reload suspend up suspend halt]
    states = %i[running suspended running stopped running running suspended running suspended stopped]
    expect(actions.map { |action| project.run(action).state.id }).to eq(states)
  end

  it "lets a paused VM go on, and shuts one down by its guest" do
    project.vagrantfile
    project.run(:up)
    vm["state"] = "paused"
    expect(project.run(:up).state.id).to eq(:running)
    vm["state"] = "paused"
    project.run(:halt)
    expect(daemon.requests.last(6).map(&:last).compact.map { |body| body["op"] }).to eq(%w[unpause shutdown])
  end

  it "is switched off where its guest does not shut down" do
    project.vagrantfile
    project.run(:up)
    daemon.shutdown_hangs = true
    expect(project.run(:halt).state.id).to eq(:stopped)
    expect(project.lines).to include(match(/did not shut down/))
  end

  it "is switched off at once by force" do
    project.vagrantfile
    project.run(:up)
    daemon.shutdown_hangs = true
    project.run(:halt, force_halt: true)
    expect(daemon.requests.map(&:last).compact.map { |body| body["op"] }.compact).to eq(%w[on off])
  end

  it "takes new CPUs and memory at a reload" do
    project.vagrantfile
    id = project.run(:up).id
    project.vagrantfile("catalyst.memory = 4096")
    project.run(:reload)
    expect(daemon.body_of("PATCH", "/v1/vms/#{id}")).to eq("memory_mib" => 4096)
    expect(vm["memory_mib"]).to eq(4096)
  end

  it "says of a disk that it keeps its size" do
    project.vagrantfile
    project.run(:up)
    project.vagrantfile('catalyst.disk_size = "100G"')
    project.run(:reload)
    expect(project.lines).to include(match(/disk has 64 GiB, and keeps its size/))
  end

  it "ends without a trace" do
    project.vagrantfile
    project.run(:up)
    machine = project.run(:destroy, force_confirm_destroy: true)
    expect(daemon.vms).to be_empty
    expect(machine.id).to be_nil
    expect(machine.data_dir.children.map { |file| file.basename.to_s } - ["vagrant_cwd"]).to be_empty
  end

  it "ends gracefully on request" do
    project.vagrantfile
    id = project.run(:up).id
    project.run(:destroy, force_confirm_destroy: true, force_halt: false)
    expect(daemon.body_of("POST", "/v1/vms/#{id}/power")).to eq("op" => "shutdown")
  end

  it "is not created by commands that need one" do
    project.vagrantfile
    %i[halt suspend resume reload].each { |action| project.run(action) }
    project.run(:destroy, force_confirm_destroy: true)
    expect(daemon.changes).to be_empty
    expect { project.run(:ssh_run) }.to raise_error(Vagrant::Errors::VMNotCreatedError)
  end

  it "has no guest to log in to while it is off" do
    project.vagrantfile
    project.run(:up)
    project.run(:halt)
    %i[ssh ssh_run provision].each do |action|
      expect { project.run(action) }.to raise_error(errors::NotRunning, /powered off/)
    end
  end

  it "is not made where the Vagrantfile is wrong" do
    project.vagrantfile("catalyst.cpus = 99")
    expect { project.run(:up) }.to raise_error(Vagrant::Errors::ConfigInvalid, /from 1 to 32/)
    expect(daemon.requests).to be_empty
  end

  it "warns of what Catalyst has not" do
    project.vagrantfile("", config: <<~RUBY)
      config.vm.synced_folder ".", "/vagrant", disabled: true
      config.vm.network "private_network", ip: "192.168.56.10"
      config.vm.clone = "/elsewhere"
    RUBY
    project.run(:up)
    expect(project.lines).to include(match(/networks of the Vagrantfile are left out/))
    expect(project.lines).to include(match(/use `clone_from`/))
  end

  describe "its name" do
    it "is the host name, which the daemon then gives the guest" do
      project.vagrantfile("", config: named("web1"))
      expect(project.run(:up).id).to eq("web1")
    end

    it "is another where the host name is another VM's, and the guest is told" do
      daemon.add_vm("web1")
      project.vagrantfile("", config: named("web1"))
      id = project.run(:up).id
      expect(id).to match(/\Ashop-\h{6}\z/)
      expect(daemon.body_of("POST", "/v1/vms/#{id}/exec")["argv"].last(2)).to eq(%w[web1 web1])
    end

    it "has no domain, which the guest is told" do
      project.vagrantfile("", config: named("web1.example.com"))
      expect(project.run(:up).id).to eq("web1")
      expect(daemon.body_of("POST", "/v1/vms/web1/exec")["argv"].last(2)).to eq(%w[web1 web1.example.com])
    end

    it "is what the Vagrantfile says, and nothing else" do
      daemon.add_vm("mine")
      project.vagrantfile('catalyst.id = "mine"')
      expect { project.run(:up) }.to raise_error(errors::Api, /vm_exists/)
      expect(daemon.vms.keys).to eq(["mine"])
    end

    it "says what the guest says where it does not take it" do
      daemon.exec_result = { "exit_code" => 1, "stdout" => "", "stderr" => "no room" }
      project.vagrantfile("", config: named("web1"))
      expect { project.run(:up) }.to raise_error(errors::Hostname, /web1: no room/)
    end

    def named(name)
      %(config.vm.synced_folder ".", "/vagrant", disabled: true\nconfig.vm.hostname = "#{name}")
    end
  end

  describe "its snapshots" do
    before do
      project.vagrantfile
      project.run(:up)
      project.run(:snapshot_save, snapshot_name: "clean one")
    end

    def restore(name, **options)
      project.run(:snapshot_restore, snapshot_name: name, snapshot_start: true, **options).state.id
    end

    it "bring back a VM that runs" do
      project.run(:halt)
      expect(restore("clean one")).to eq(:running)
    end

    it "leave it suspended where it is not to start" do
      expect(restore("clean one", snapshot_start: false)).to eq(:suspended)
    end

    it "start a VM that was off" do
      project.run(:halt)
      project.run(:snapshot_save, snapshot_name: "off")
      expect(restore("off")).to eq(:running)
      expect(restore("off", snapshot_start: false)).to eq(:stopped)
    end

    it "go when they are popped or deleted" do
      restore("clean one", snapshot_delete: true)
      expect(vm[:snapshots]).to be_empty
      project.run(:snapshot_save, snapshot_name: "more")
      project.run(:snapshot_delete, snapshot_name: "more")
      expect(vm[:snapshots]).to be_empty
    end
  end

  describe "as a clone" do
    before do
      project.vagrantfile("", config: <<~RUBY)
        config.vm.synced_folder ".", "/vagrant", disabled: true
        config.vm.define "base"
        %w[web db].each do |name|
          config.vm.define name do |machine|
            machine.vm.provider("catalyst") do |catalyst|
              catalyst.clone_from = "base"
              catalyst.memory = 2048
            end
          end
        end
      RUBY
    end

    it "is made of a machine of the Vagrantfile" do
      base = project.run(:up, :base).id
      web = project.run(:up, :web).id
      expect(daemon.body_of("POST", "/v1/vms")).to eq("id" => web, "parent" => base, "tags" => ["vagrant"])
      expect(web).to match(/\Ashop-web-\h{6}\z/)
    end

    it "runs already if its parent does, and is provisioned all the same; its size counts later" do
      project.run(:up, :base)
      before = daemon.changes.length
      web = project.run(:up, :web)
      expect(web.state.id).to eq(:running)
      expect(daemon.changes.drop(before)).to eq(["POST /v1/vms", "PATCH /v1/vms/#{web.id}"])
      expect(project.lines).to include(match(/count from its next start/))
      expect(web.data_dir.join("action_provision")).to be_file
    end

    it "is not made of a machine that does not exist" do
      expect { project.run(:up, :web) }.to raise_error(errors::NoParent, /vagrant up base/)
    end

    it "waits for a parent that is being made at the same time" do
      env = project.environment
      env.batch do |batch|
        %i[base web db].each { |name| batch.action(env.machine(name, :catalyst), :up) }
      end
      bodies = daemon.requests.select { |request| request[0, 2] == ["POST", "/v1/vms"] }.map(&:last)
      base = bodies.find { |body| body["parent"].nil? }["id"]
      expect(bodies.map { |body| body["parent"] }).to eq([nil, base, base])
      expect(daemon.changes.first(2)).to eq(["POST /v1/vms", "POST /v1/vms/#{base}/power"])
      expect(daemon.vms.values.map { |vm| vm["state"] }).to all(eq("powered on"))
    end

    it "is not made where its parent does not come up at the same time" do
      daemon.refuses = "POST /v1/vms"
      env = project.environment
      up = lambda do
        env.batch { |batch| %i[base web].each { |name| batch.action(env.machine(name, :catalyst), :up) } }
      end
      expect(&up).to raise_error(Vagrant::Errors::BatchMultiError, /run `vagrant up base` first/)
    end

    it "is made of any VM of the daemon" do
      daemon.add_vm("golden")
      project.vagrantfile('catalyst.clone_from = "golden"')
      project.run(:up)
      expect(daemon.body_of("POST", "/v1/vms")["parent"]).to eq("golden")
    end
  end
end
