# frozen_string_literal: true

require "json"

RSpec.describe "boxes" do
  include_context "with a daemon"

  errors = VagrantPlugins::Catalyst::Errors

  # Puts a box where Vagrant has them.
  def add_box(provider, metadata: {}, **files)
    folder = project.environment.boxes_path.join("some-VAGRANTSLASH-box", "0", provider)
    folder.mkpath
    folder.join("metadata.json").write(JSON.generate({ provider: provider }.merge(metadata)))
    files.each { |name, text| folder.join(name.to_s).write(text) }
    project.vagrantfile('catalyst.id = "web1"', config: <<~RUBY)
      config.vm.box = "some/box"
      config.vm.synced_folder ".", "/vagrant", disabled: true
    RUBY
  end

  def registered
    daemon.body_of("POST", "/api/vms")
  end

  it "of VMware's are copied, but for disks that are linked, and registered where the copy lies" do
    add_box("vmware_desktop", "photon.vmx": 'memsize = "512"', "disk.vmdk": "disk")
    machine = project.run(:up)
    vmx = Pathname.new(registered["sourceReference"])
    expect(registered).to include("id" => "web1", "tag" => "vagrant", "name" => "Vagrant: shop default")
    expect(vmx.to_s).to start_with(machine.data_dir.to_s)
    files = [vmx, vmx.dirname.join("disk.vmdk")]
    expect(files.map(&:read)).to eq(['memsize = "512"', "disk"])
    expect(files.map { |file| file.stat.nlink }).to eq([1, 2])
    expect(daemon.changes).to eq(["POST /api/vms", "POST /v1/vms/web1/power"])
  end

  it "of libvirt's get a VMX file beside their disk" do
    add_box("libvirt", metadata: { format: "qcow2" }, "box.img": "disk")
    project.run(:up)
    vmx = Pathname.new(registered["sourceReference"])
    expect(vmx.dirname.join("box.qcow2").read).to eq("disk")
    expect(vmx.read).to include('sata0:0.fileName = "box.qcow2"', 'displayName = "Vagrant: shop default"')
  end

  it "of libvirt's newer form name their disk" do
    add_box("libvirt", metadata: { disks: [{ path: "root.img" }] }, "root.img": "disk")
    project.run(:up)
    expect(Pathname.new(registered["sourceReference"]).dirname.join("box.qcow2").read).to eq("disk")
  end

  {
    "without a VMX file" => ["vmware_desktop", {}, /no .vmx file/],
    "of two disks" => ["libvirt", { disks: [{ path: "a" }, { path: "b" }] }, /2 disks/],
    "of a raw disk" => ["libvirt", { format: "raw" }, /format raw/],
    "whose disk is elsewhere" => ["libvirt", { disks: [{ path: "../../x" }] }, /not in its folder/],
    "without a disk" => ["libvirt", {}, /box.img is missing/]
  }.each do |what, (provider, metadata, reason)|
    it "#{what} are refused with the reason" do
      add_box(provider, metadata: metadata)
      expect { project.run(:up) }.to raise_error(errors::BadBox, reason)
      expect(daemon.vms).to be_empty
    end
  end

  it "leave no copy where the daemon refuses them" do
    add_box("vmware_desktop", "photon.vmx": "")
    daemon.add_vm("web1")
    expect { project.run(:up) }.to raise_error(errors::Api, /409/)
    expect(project.machine.data_dir.join("box")).not_to exist
  end

  it "have their own user and key, at the address that the guest holds" do
    add_box("vmware_desktop", "photon.vmx": "")
    info = project.run(:up).ssh_info
    expect(info.slice(:host, :username)).to eq(host: "10.208.0.10", username: "vagrant")
    expect(info[:private_key_path].first).to end_with("insecure_private_key")
  end

  it "are sized by the Vagrantfile when they are registered" do
    add_box("vmware_desktop", "photon.vmx": "")
    file = File.join(project.folder, "Vagrantfile")
    File.write(file, File.read(file).sub("catalyst.id", "catalyst.cpus = 4; catalyst.id"))
    project.run(:up)
    expect(daemon.body_of("PATCH", "/v1/vms/web1")).to eq("cpus" => 4)
  end
end
