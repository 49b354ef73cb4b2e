# frozen_string_literal: true

require "socket"
require "vagrant-catalyst/client"

RSpec.describe VagrantPlugins::Catalyst::Client do
  before { VagrantPlugins::Catalyst::Plugin.load_texts }

  errors = VagrantPlugins::Catalyst::Errors

  # A server that takes one connection and says what the block gives, or nothing.
  def server
    listener = TCPServer.new("127.0.0.1", 0)
    thread = Thread.new do
      socket = listener.accept
      socket.readpartial(4096)
      words = yield
      socket.write(words) if words
      socket.close
    end
    [described_class.new("127.0.0.1:#{listener.addr[1]}"), thread]
  end

  def reply(status, body)
    "HTTP/1.1 #{status} X\r\nContent-Length: #{body.bytesize}\r\n\r\n#{body}"
  end

  def failure(status, body)
    client, = server { reply(status, body) }
    client.vm("web1")
  rescue StandardError => error
    error
  end

  it "reads every form of a host that the command line reads" do
    {
      "localhost:9000" => ["localhost", 9000], "http://localhost:9000/" => ["localhost", 9000],
      "box" => ["box", 8080], ":9000" => ["localhost", 9000], "[::1]:81" => ["::1", 81]
    }.each { |text, parsed| expect(described_class.parse_host(text)).to eq(parsed) }
    ["", "https://a:1", "a:b", "a:0", "a:70000", "a b", "a/b", "ftp://a"].each do |text|
      expect(described_class.parse_host(text)).to be_nil
    end
  end

  it "says in one sentence how to start a daemon where none answers" do
    free = TCPServer.new("127.0.0.1", 0).then { |server| server.addr[1].tap { server.close } }
    expect { described_class.new("127.0.0.1:#{free}").vm("web1") }.to raise_error(errors::NoDaemon) { |error|
      expect(error.message).to include("sudo catalyst-daemon --background --owner $USER")
      expect(error.message.count(".\n") - error.message.scan("127.0.0.1").length * 3).to be <= 3
    }
  end

  it "shows what the daemon says as it is: message, causes and code" do
    body = '{"code":"host_unfit","message":"The VM cannot start","causes":["no KVM","it is off"]}'
    error = failure(503, body)
    expect(error).to be_a(errors::Api)
    expect(error.message).to eq("The VM cannot start: no KVM: it is off (host_unfit)")
    expect(error.code).to eq("host_unfit")
  end

  it "shows errors of the AppCatalyst API and refusals, whose code is a number" do
    error = failure(403, '{"code":403,"message":"this daemon is bob\'s"}')
    expect(error.message).to eq("this daemon is bob's (403)")
  end

  it "lets nothing through that steers a terminal" do
    error = failure(404, JSON.generate(code: "vm_not_found", message: "no\e[2J\nVM"))
    expect(error.message).to eq("no [2J VM (vm_not_found)")
  end

  it "tells another program on the port from a daemon" do
    [
      [200, "<html>It works!</html>"], [404, "<html>Not found</html>"], [404, "[]"], [500, '{"error":"x"}'],
      [200, ""]
    ].each { |status, body| expect(failure(status, body)).to be_a(errors::NotCatalyst) }
    client, = server { "220 mail.example.com ESMTP\r\n" }
    expect { client.vm("web1") }.to raise_error(errors::NotCatalyst)
  end

  it "does not read an answer without end" do
    client, = server { "HTTP/1.1 200 OK\r\n\r\n#{"x" * ((16 << 20) + 1)}" }
    expect { client.vm("web1") }.to raise_error(errors::NotCatalyst)
  end

  it "names a daemon that went away, and one that is too slow, and asks neither twice" do
    client, = server { nil }
    expect { client.power("web1", "on") }.to raise_error(errors::Lost)
    client, thread = server { sleep }
    expect { client.power("web1", "shutdown", 0.2) }.to raise_error(errors::Slow, /shutdown|power/)
    thread.kill
  end

  it "asks the daemon itself, whatever proxy the environment names" do
    ENV["http_proxy"] = "http://127.0.0.1:1"
    client, = server { reply(200, '{"id":"web1"}') }
    expect(client.vm("web1")).to eq("id" => "web1")
  ensure
    ENV.delete("http_proxy")
  end

  it "puts names into paths so that they stay one word" do
    asked = nil
    listener = TCPServer.new("127.0.0.1", 0)
    Thread.new do
      socket = listener.accept
      asked = socket.gets
      socket.write("HTTP/1.1 204 X\r\n\r\n")
      socket.close
    end
    described_class.new("127.0.0.1:#{listener.addr[1]}").delete_snapshot("web1", "a/b c?d")
    expect(asked).to start_with("DELETE /v1/vms/web1/snapshots/a%2Fb%20c%3Fd HTTP")
  end
end
