# frozen_string_literal: true

require "vagrant-catalyst/config"

RSpec.describe VagrantPlugins::Catalyst::Config do
  include_context "with a daemon"

  before { VagrantPlugins::Catalyst::Plugin.load_texts }

  def config(**values)
    described_class.new.tap do |config|
      values.each { |name, value| config.public_send("#{name}=", value) }
      config.finalize!
    end
  end

  def errors(config: "", **values)
    project.vagrantfile("", config: config)
    self.config(**values).validate(project.machine).fetch("Catalyst")
  end

  it "leaves to the daemon what a Vagrantfile does not say" do
    unset = config
    values = %i[id cpus memory disk_size template clone_from].map { |name| unset.public_send(name) }
    expect(values).to all(be_nil)
    expect(unset.host).to eq("localhost:8080")
    expect(unset.all_tags).to eq(["vagrant"])
  end

  it "takes the daemon that CATALYST_HOST names, unless the Vagrantfile names one" do
    ENV["CATALYST_HOST"] = "localhost:9090"
    expect(config.host).to eq("localhost:9090")
    expect(config(host: "localhost:7070").host).to eq("localhost:7070")
  ensure
    ENV.delete("CATALYST_HOST")
  end

  it "reads sizes as people write them" do
    expect([2048, "2048", "2G", "2 GB", "2GiB"].map { |size| config(memory: size).memory }).to all(eq(2048))
    expect([100, "100", "100g", "100GB"].map { |size| config(disk_size: size).disk_size }).to all(eq(100))
    expect(config(disk_size: "2T").disk_size).to eq(2048)
    expect(config(cpus: "2").cpus).to eq(2)
  end

  it "keeps what one Vagrantfile says where another says nothing" do
    first = described_class.new.tap { |config| config.memory = "2G" }
    second = described_class.new.tap { |config| config.cpus = 2 }
    merged = first.merge(second).tap(&:finalize!)
    expect([merged.memory, merged.cpus]).to eq([2048, 2])
  end

  it "has nothing against what is right" do
    right = { cpus: 32, memory: 128, disk_size: 16_384, id: "Web_1.test", tags: %w[a b], host: "[::1]:9090" }
    expect(errors(**right)).to be_empty
  end

  {
    { cpus: 0 } => /`cpus` is 0.*from 1 to 32/,
    { cpus: "many" } => /`cpus` is many/,
    { cpus: 1.5 } => /`cpus` is 1.5/,
    { memory: 127 } => /`memory` is 127.*128 MiB at least/m,
    { memory: "lots" } => /`memory` is lots.*"2G"/m,
    { memory: -1 } => /`memory` is -1/,
    { disk_size: 63 } => /`disk_size` is 63.*from 64 to 16384/m,
    { disk_size: "1M" } => /`disk_size` is 1M/,
    { id: "a b" } => /`id` is a b/,
    { id: "power" } => /`id` is power/,
    { id: "x" * 64 } => /`id` is x+/,
    { id: "../etc" } => /`id` is/,
    { host: "https://a" } => %r{`host` is https://a.*HOST:PORT}m,
    { host: "a:99999" } => /`host` is a:99999/,
    { tags: ["a,b"] } => /`tags` are a,b/,
    { tags: (1..16).to_a } => /at most 16/,
    { template: "lumen", clone_from: "base" } => /several: template, clone_from/,
    { clone_from: "base", disk_size: 100 } => /with clone_from the VM has the disk of that/
  }.each do |values, sentence|
    it "says what is wrong with #{values.inspect[0, 60]}" do
      expect(errors(**values)).to contain_exactly(match(sentence))
    end
  end

  it "does not take a box and a template at once" do
    wrong = errors(config: 'config.vm.box = "some/box"', template: "lumen")
    expect(wrong).to contain_exactly(match(/template, config.vm.box/))
  end

  it "does not take a machine that is a clone of this one, or this one" do
    project.vagrantfile("", config: <<~RUBY)
      { "a" => "a", "b" => "c", "c" => "b", "d" => "b" }.each do |name, parent|
        config.vm.define(name) { |m| m.vm.provider("catalyst") { |catalyst| catalyst.clone_from = parent } }
      end
    RUBY
    wrong = %i[a b c d].map do |name|
      machine = project.machine(name)
      machine.provider_config.validate(machine).fetch("Catalyst")
    end
    leads_back = contain_exactly(match(/leads back to the machine itself/))
    expect(wrong).to match([leads_back, leads_back, leads_back, []])
  end

  it "names a word that it does not know" do
    wrong = config.tap { |config| config.memroy = 1 }
    project.vagrantfile
    expect(wrong.validate(project.machine).fetch("Catalyst")).to contain_exactly(match(/memroy/))
  end
end
