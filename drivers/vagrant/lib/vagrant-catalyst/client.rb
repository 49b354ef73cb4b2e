# frozen_string_literal: true

require "erb"
require "json"
require "net/http"

require "vagrant-catalyst/errors"

module VagrantPlugins
  module Catalyst
    # The daemon's REST API as calls. VMs and all else are hashes with the names of the API.
    class Client
      DEFAULT_HOST = "localhost:8080"
      # Longest waits in seconds: for a connection, for an answer that needs no disk and no guest, for one
      # that does (memory is saved, disks are merged).
      CONNECT = 5
      ANSWER = 60
      WORK = 600
      # Largest answer that is read, in bytes.
      MAX_ANSWER = 16 << 20

      VERBS = {
        get: Net::HTTP::Get, post: Net::HTTP::Post, patch: Net::HTTP::Patch, delete: Net::HTTP::Delete
      }.freeze
      HOST = %r{\A(?:http://)?(?<name>\[[0-9a-f:.%]+\]|[a-z0-9._-]*)(?::(?<port>[0-9]{1,5}))?/?\z}i.freeze
      UNREACHABLE = [Errno::ECONNREFUSED, Errno::EHOSTUNREACH, Errno::ENETUNREACH, Errno::EADDRNOTAVAIL,
                     SocketError, Net::OpenTimeout].freeze
      BROKEN = [EOFError, IOError, Errno::ECONNRESET, Errno::EPIPE, Errno::ECONNABORTED].freeze

      # Reads `http://HOST:PORT`, `HOST:PORT`, `HOST` or `:PORT`, as `catalyst --host` does.
      #
      # @return [Array(String, Integer), nil] name and port; nil if it is none of these
      def self.parse_host(text)
        found = HOST.match(text.to_s.strip)
        return if found.nil? || text.to_s.strip.empty?

        name = found[:name].delete("[]")
        port = found[:port] ? found[:port].to_i : 8080
        [name.empty? ? "localhost" : name, port] if port.between?(1, 65_535)
      end

      # @param [String] host where the daemon listens
      def initialize(host)
        @host = host
        @name, @port = self.class.parse_host(host)
      end

      # The daemon's state folder: no two daemons have the same.
      def state_dir
        version = get("/v1/version")
        raise Errors::NotCatalyst, host: @host unless version.is_a?(Hash) && version["state_dir"]

        version["state_dir"]
      end

      def vm(id)
        get(vm_path(id))
      end

      def create(body)
        post("/v1/vms", body, WORK)
      end

      # Registers a VM by its VMX file, by the AppCatalyst API.
      def register(body)
        post("/api/vms", body, WORK)
      end

      def update(id, body)
        request(:patch, vm_path(id), body)
      end

      # @param [String] operation `on`, `off`, `shutdown`, `suspend`, `pause` or `unpause`
      def power(id, operation, timeout = WORK)
        post("#{vm_path(id)}/power", { op: operation }, timeout)
      end

      # Deletes a VM in whatever state.
      def delete(id)
        request(:delete, "#{vm_path(id)}?force=true", nil, WORK)
      end

      # All that a login takes, once sshd answers.
      def ssh(id)
        get("#{vm_path(id)}/ssh")
      end

      # The address that the guest holds.
      def address(id)
        get("#{vm_path(id)}/address").fetch("address")
      end

      # Runs a command in the guest as root.
      #
      # @return [Hash] `exit_code`, `stdout`, `stderr`
      def exec(id, argv)
        post("#{vm_path(id)}/exec", { argv: argv }, ANSWER * 2)
      end

      def snapshots(id)
        get("#{vm_path(id)}/snapshots")
      end

      def create_snapshot(id, name)
        post("#{vm_path(id)}/snapshots", { name: name }, WORK)
      end

      # @param [Boolean] start whether a VM whose memory was saved goes on at once
      def restore_snapshot(id, name, start)
        post("#{vm_path(id)}/snapshots/#{segment(name)}/restore", { start: start }, WORK)
      end

      def delete_snapshot(id, name)
        request(:delete, "#{vm_path(id)}/snapshots/#{segment(name)}", nil, WORK)
      end

      def folders(id)
        known("synced folders") { get("#{vm_path(id)}/folders") }
      end

      def add_folder(id, folder)
        known("synced folders") { post("#{vm_path(id)}/folders", folder, ANSWER * 2) }
      end

      def delete_folder(id, name)
        known("synced folders") { request(:delete, "#{vm_path(id)}/folders/#{segment(name)}") }
      end

      def ports(id)
        known("forwarded ports") { get("#{vm_path(id)}/ports") }
      end

      def add_port(id, port)
        known("forwarded ports") { post("#{vm_path(id)}/ports", port) }
      end

      def delete_port(id, host_port, protocol)
        name = protocol == "tcp" ? host_port.to_s : "#{host_port}-#{protocol}"
        known("forwarded ports") { request(:delete, "#{vm_path(id)}/ports/#{name}") }
      end

      private

      def get(path)
        request(:get, path)
      end

      def post(path, body, timeout = ANSWER)
        request(:post, path, body, timeout)
      end

      def vm_path(id)
        "/v1/vms/#{segment(id)}"
      end

      def segment(text)
        ERB::Util.url_encode(text.to_s)
      end

      # Says of a daemon that does not know a path what it lacks.
      def known(what)
        yield
      rescue Errors::Api => error
        raise unless error.code == "path_not_found"

        raise Errors::TooOld, host: @host, what: what, reason: error.message
      end

      def request(verb, path, body = nil, timeout = ANSWER)
        message = VERBS.fetch(verb).new(path, "Accept" => "application/json")
        unless body.nil?
          message["Content-Type"] = "application/json"
          message.body = JSON.generate(body)
        end
        answer, text = exchange(message, timeout)
        return if answer.code == "204"

        parsed = parse(text)
        return parsed if answer.is_a?(Net::HTTPSuccess)

        raise refusal(parsed)
      end

      def exchange(message, timeout)
        # The daemon is on this machine or behind a tunnel: never through http_proxy.
        http = Net::HTTP.new(@name, @port, nil)
        http.open_timeout = CONNECT
        http.read_timeout = timeout
        # What changes something is not to be done twice.
        http.max_retries = 0
        http.start { transmit(http, message) }
      rescue *UNREACHABLE => error
        raise Errors::NoDaemon, host: @host, reason: plain(error.message)
      rescue Net::ReadTimeout
        raise Errors::Slow, host: @host, seconds: timeout, request: "#{message.method} #{message.path}"
      rescue Net::HTTPBadResponse, Net::HTTPHeaderSyntaxError, Net::ProtocolError
        raise Errors::NotCatalyst, host: @host
      rescue *BROKEN => error
        raise Errors::Lost, host: @host, reason: plain(error.message)
      end

      def transmit(http, message)
        text = +""
        answer = http.request(message) do |response|
          response.read_body do |part|
            text << part
            raise Errors::NotCatalyst, host: @host if text.bytesize > MAX_ANSWER
          end
        end
        [answer, text]
      end

      def parse(text)
        JSON.parse(text.force_encoding(Encoding::UTF_8).scrub)
      rescue JSON::ParserError
        raise Errors::NotCatalyst, host: @host
      end

      def refusal(body)
        raise Errors::NotCatalyst, host: @host unless body.is_a?(Hash) && body["message"].is_a?(String)

        words = [body["message"], *Array(body["causes"])].join(": ")
        Errors::Api.new(code: plain(body["code"].to_s), reason: plain(words))
      end

      # One line without what could steer a terminal: some of it is said by guests.
      def plain(text)
        text.gsub(/[[:cntrl:]]+/, " ").strip
      end
    end
  end
end
