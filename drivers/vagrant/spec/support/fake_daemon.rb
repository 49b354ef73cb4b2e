# frozen_string_literal: true

require "json"
require "socket"

# An HTTP server in this process that answers like the daemon, with VMs that are nothing but their states. It
# keeps what it was asked, in order.
class FakeDaemon
  # Where each operation leads, by the state that it is possible in.
  POWER = {
    "on" => { "powered off" => "powered on", "suspended" => "powered on" },
    "off" => Hash.new("powered off"),
    "shutdown" => { "powered on" => "powered off" },
    "suspend" => { "powered on" => "suspended", "paused" => "suspended" },
    "unpause" => { "paused" => "powered on" }
  }.freeze
  STATUS = {
    "vm_not_found" => 404, "snapshot_not_found" => 404, "path_not_found" => 404, "folder_not_found" => 404,
    "vm_exists" => 409, "folder_exists" => 409, "busy" => 409, "port_taken" => 409, "wrong_state" => 409,
    "guest_not_ready" => 409, "invalid_request" => 400, "guest_timeout" => 504
  }.freeze

  # What a handler throws to refuse.
  class Refused < StandardError
    attr_reader :code

    def initialize(code, message)
      super(message)
      @code = code
    end
  end

  attr_reader :requests, :vms, :port
  attr_accessor :refuses, :state_dir, :taken_ports, :lacks, :shutdown_hangs, :exec_result, :answers
  attr_accessor :busy_folders

  def initialize
    @requests = []
    @vms = {}
    @state_dir = "/state"
    @taken_ports = []
    @busy_folders = []
    @lacks = []
    @exec_result = { "exit_code" => 0, "stdout" => "", "stderr" => "", "truncated" => false }
    @answers = {}
    @lock = Mutex.new
    @server = TCPServer.new("127.0.0.1", 0)
    @port = @server.addr[1]
    @thread = Thread.new { serve }
  end

  def host
    "127.0.0.1:#{@port}"
  end

  def close
    @thread.kill
    @server.close
  end

  # Methods and paths that were asked for, of those that change something.
  def changes
    @requests.reject { |request| request[0] == "GET" }.map { |request| request[0, 2].join(" ") }
  end

  # The body of the last request of a method and path.
  def body_of(method, path)
    @requests.reverse.find { |request| request[0] == method && request[1] == path }&.last
  end

  def add_vm(id, **what)
    @vms[id] = {
      "id" => id, "name" => id, "state" => "powered off", "tags" => [], "cpus" => 1, "memory_mib" => 1024,
      "disk_gib" => 64, "template" => "lumen", "mac" => "02:ca:00:00:00:01", "address" => "10.208.0.10",
      :snapshots => [], :folders => [], :ports => []
    }.merge(what)
  end

  private

  def serve
    loop do
      socket = @server.accept
      Thread.new { answer(socket) }
    end
  end

  def answer(socket)
    method, path, body = read(socket)
    return if method.nil?

    status, reply = @lock.synchronize do
      @requests << [method, path, body]
      handle(method, path, body)
    end
    text = reply.nil? ? "" : JSON.generate(reply)
    headers = ["HTTP/1.1 #{status} X", "Content-Length: #{text.bytesize}", "Connection: close"]
    socket.write("#{headers.join("\r\n")}\r\n\r\n#{text}")
  ensure
    socket.close
  end

  def read(socket)
    method, path, = socket.gets.to_s.split
    return if method.nil?

    length = 0
    while (line = socket.gets.chomp) != ""
      name, value = line.split(": ", 2)
      length = value.to_i if name.casecmp?("content-length")
    end
    text = socket.read(length)
    [method, path, text.empty? ? nil : JSON.parse(text)]
  end

  def handle(method, path, body)
    words = path.split("?").first.split("/").reject(&:empty?)
    words = words.map { |word| word.gsub(/%(\h\h)/) { $1.hex.chr } }
    return register(body) if words == %w[api vms]

    route(method, words.drop(1), body)
  rescue Refused => refusal
    [STATUS.fetch(refusal.code), { "code" => refusal.code, "message" => refusal.message }]
  end

  def route(method, words, body)
    refuse("invalid_request", "not today") if @refuses == "#{method} /v1/#{words.join("/")}"
    case [method, *words]
    in ["GET", "version"] then [200, { "product" => "catalyst", "state_dir" => @state_dir }]
    in ["POST", "vms"] then create(body)
    in ["GET", "vms", id] then [200, shown(vm(id))]
    in ["PATCH", "vms", id] then [200, shown(vm(id).merge!(body))]
    in ["DELETE", "vms", id] then [204, (@vms.delete(vm(id)["id"]) && nil)]
    in ["POST", "vms", id, "power"] then power(vm(id), body["op"])
    in ["GET", "vms", id, "ssh"] then [200, login(vm(id))]
    in ["GET", "vms", id, "address"] then [200, { "address" => running(vm(id))["address"] }]
    in ["POST", "vms", id, "exec"] then [200, running(vm(id)) && output(body["argv"].first)]
    in [_, "vms", id, "snapshots", *rest] then snapshots(method, vm(id), rest, body)
    in [_, "vms", id, "folders" | "ports" => what, *rest]
      refuse("path_not_found", "There is no path /v1/vms/#{id}/#{what}") if @lacks.include?(what)
      what == "folders" ? folders(method, vm(id), rest, body) : ports(method, vm(id), rest, body)
    else refuse("path_not_found", "There is no path /v1/#{words.join("/")}")
    end
  end

  # What a program in a guest prints.
  def output(program)
    @answers.key?(program) ? @exec_result.merge("stdout" => @answers[program]) : @exec_result
  end

  def refuse(code, message)
    raise Refused.new(code, message)
  end

  def shown(vm)
    vm.reject { |key, _| key.is_a?(Symbol) }
  end

  def vm(id)
    @vms[id] || refuse("vm_not_found", "There is no VM '#{id}'; see: catalyst vm list")
  end

  def running(vm)
    vm["state"] == "powered on" ? vm : refuse("wrong_state", "The VM '#{vm["id"]}' is #{vm["state"]}")
  end

  def create(body)
    known = %w[id name parent template cpus memory_mib disk_gib tags]
    refuse("invalid_request", "unknown field") unless (body.keys - known).empty?
    refuse("vm_exists", "There is a VM '#{body["id"]}' already") if @vms.key?(body["id"])
    parent = vm(body["parent"]) if body["parent"]
    made = add_vm(body["id"], **body.slice("name", "cpus", "memory_mib", "disk_gib", "tags").compact)
    made["state"] = parent["state"] if parent
    [201, shown(made)]
  end

  def register(body)
    taken = { "code" => 409, "message" => "There is a VM '#{body["id"]}' already" }
    return [409, taken] if @vms.key?(body["id"])

    add_vm(body["id"], "name" => body["name"])
    [200, body]
  end

  def power(vm, operation)
    hangs = operation == "shutdown" && @shutdown_hangs
    refuse("guest_timeout", "The guest of '#{vm["id"]}' did not shut down") if hangs
    following = POWER.fetch(operation)[vm["state"]]
    refuse("wrong_state", "The VM '#{vm["id"]}' is #{vm["state"]}; not '#{operation}' now") unless following
    vm["state"] = following
    [200, shown(vm)]
  end

  def login(vm)
    running(vm)
    { "address" => vm["address"], "port" => 22, "user" => "catalyst", "key_file" => "/state/ssh/id_ed25519" }
  end

  def snapshots(method, vm, rest, body)
    all = vm[:snapshots]
    case [method, *rest]
    in ["GET"] then [200, all.map { |one| { "name" => one[:name] } }]
    in ["POST"]
      all << { name: body["name"], state: vm["state"] }
      [201, { "name" => body["name"] }]
    in ["DELETE", name] then [204, (all.delete(snapshot(all, name)) && nil)]
    in ["POST", name, "restore"]
      memory = snapshot(all, name)[:state] == "powered on"
      vm["state"] = "powered off"
      vm["state"] = body["start"] ? "powered on" : "suspended" if memory
      [200, shown(vm)]
    end
  end

  def snapshot(all, name)
    all.find { |one| one[:name] == name } || refuse("snapshot_not_found", "no snapshot '#{name}'")
  end

  def folders(method, vm, rest, body)
    all = vm[:folders]
    case [method, *rest]
    in ["GET"] then [200, all]
    in ["POST"]
      there = all.find { |one| one["name"] == body["name"] }
      refuse("folder_exists", "There is a folder '#{body["name"]}' already") if there && there != body
      all << body unless there
      [201, body]
    in ["DELETE", name]
      refuse("busy", "The folder '#{name}' is used by bash (412)") if @busy_folders.include?(name)
      all.reject! { |one| one["name"] == name } || refuse("folder_not_found", "There is no folder '#{name}'")
      [204, nil]
    end
  end

  def ports(method, vm, rest, body)
    all = vm[:ports]
    case [method, *rest]
    in ["GET"] then [200, all]
    in ["POST"]
      port = body.slice("host_port", "protocol")
      used = @taken_ports.include?(body["host_port"]) ||
             @vms.values.any? { |other| other[:ports].any? { |one| port <= one } }
      refuse("port_taken", "Port #{body["host_port"]} is used by nginx (77)") if used
      all << { "host_address" => "127.0.0.1" }.merge(body)
      [201, all.last]
    in ["DELETE", name]
      number, protocol = name.split("-")
      all.reject! { |one| one["host_port"] == number.to_i && one["protocol"] == (protocol || "tcp") }
      [204, nil]
    end
  end
end
