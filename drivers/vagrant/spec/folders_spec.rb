# frozen_string_literal: true

require "vagrant-catalyst/synced_folder"

RSpec.describe VagrantPlugins::Catalyst::SyncedFolder do
  include_context "with a daemon"

  errors = VagrantPlugins::Catalyst::Errors

  def names
    vm[:folders].map { |folder| folder["name"] }
  end

  it "shares the Vagrantfile's folder by default" do
    project.vagrantfile("", config: "")
    id = project.run(:up).id
    path = File.realpath(project.folder)
    expect(daemon.body_of("POST", "/v1/vms/#{id}/folders")).to eq(
      "name" => "vagrant", "host_path" => path, "guest_path" => "/vagrant", "read_only" => false
    )
  end

  it "shares them when the machine runs, the outer before the inner" do
    project.vagrantfile("", config: <<~RUBY)
      config.vm.synced_folder ".", "/srv/app/data", create: true
      config.vm.synced_folder ".", "/srv"
    RUBY
    id = project.run(:up).id
    expect(daemon.changes.last(3)).to eq(["POST /v1/vms/#{id}/power", *["POST /v1/vms/#{id}/folders"] * 2])
    expect(vm[:folders].map { |folder| folder["guest_path"] }).to eq(["/srv", "/srv/app/data"])
  end

  it "passes on who owns them, by number or by name" do
    daemon.answers = { "id" => "33\n", "getent" => "staff:x:50:\n" }
    project.vagrantfile("", config: <<~RUBY)
      config.vm.synced_folder ".", "/a", owner: 0, group: "7", mount_options: ["ro"]
      config.vm.synced_folder ".", "/b", owner: "www-data", group: "staff"
      config.vm.synced_folder ".", "/c", mount_options: ["uid=5,gid=6", "dmode=775"]
    RUBY
    project.run(:up)
    given = vm[:folders].to_h { |folder| [folder["name"], folder.values_at("uid", "gid", "read_only")] }
    expect(given).to eq("a" => [0, 7, true], "b" => [33, 50, false], "c" => [5, 6, false])
    expect(project.lines).to include(match(/does not have: dmode=775/))
  end

  it "says whom the guest does not know" do
    daemon.exec_result = { "exit_code" => 1, "stdout" => "", "stderr" => "" }
    project.vagrantfile("", config: 'config.vm.synced_folder ".", "/a", owner: "nobody2"')
    expect { project.run(:up) }.to raise_error(errors::NoSuchUser, /nobody2/)
  end

  it "takes away what the Vagrantfile has no more, and leaves what is not its own" do
    project.vagrantfile("", config: 'config.vm.synced_folder ".", "/data"')
    project.run(:up)
    expect(names).to eq(["data"])
    vm[:folders] << { "name" => "other", "host_path" => "/x" }
    project.vagrantfile
    project.run(:reload)
    expect(names).to eq(["other"])
  end

  it "shares anew what the Vagrantfile says otherwise, and says who is in the way" do
    project.vagrantfile("", config: 'config.vm.synced_folder ".", "/vagrant"')
    project.run(:up)
    project.vagrantfile("", config: 'config.vm.synced_folder ".", "/vagrant", mount_options: ["ro"]')
    project.run(:reload)
    expect(vm[:folders].map { |folder| folder["read_only"] }).to eq([true])
    project.vagrantfile("", config: 'config.vm.synced_folder ".", "/vagrant"')
    daemon.busy_folders << "vagrant"
    expect { project.run(:reload) }.to raise_error(errors::Api, /used by bash \(412\).*busy/)
  end

  it "says of a daemon without folders that it is too old, and can do without" do
    daemon.lacks << "folders"
    project.vagrantfile("", config: "")
    expect { project.run(:up) }.to raise_error(errors::TooOld, /no synced folders.*disabled: true/m)
    project.vagrantfile
    expect(project.run(:reload).state.id).to eq(:running)
  end

  it "is not for guests of boxes, nor for other providers" do
    project.vagrantfile("", config: 'config.vm.box = "some/box"')
    expect(described_class.new.usable?(project.machine)).to be(false)
    project.vagrantfile
    expect(described_class.new.usable?(project.machine)).to be(true)
  end

  it "gives each folder a name of its own that the daemon takes" do
    ids = ["/vagrant", "/a/b", "/a_b", "/a b", "/", "/é", "/#{"x" * 100}", "/#{"x" * 101}", "data"]
    names = ids.map { |id| described_class.new.name_of(id) }
    expect(names.uniq.length).to eq(ids.length)
    expect(names).to all(match(/\A[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?\z/))
    expect(names.first(2)).to eq(%w[vagrant a_b])
  end
end
