# frozen_string_literal: true

require "vagrant"

require "vagrant-catalyst/client"
require "vagrant-catalyst/sizes"

module VagrantPlugins
  module Catalyst
    # What a Vagrantfile says of a machine: `config.vm.provider "catalyst" do |catalyst| … end`.
    class Config < Vagrant.plugin("2", :config)
      CPUS = (1..32).freeze
      LEAST_MEMORY_MIB = 128
      DISK_GIB = (64..16_384).freeze
      ID = /\A(?!power\z)[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?\z/i.freeze
      MOST_TAGS = 16
      TAG = /\A[^,[:cntrl:]]{1,64}\z/.freeze

      # @return [String] where the daemon listens; by default CATALYST_HOST, or localhost:8080
      attr_accessor :host
      # @return [String] the VM's id; by default the machine's host name if it is free, or one made from
      #   folder and machine
      attr_accessor :id
      # @return [Integer] virtual CPUs
      attr_accessor :cpus
      # @return [Integer] memory in MiB; given as that, or as a text such as "2G"
      attr_accessor :memory
      # @return [Integer] the disk's size in GiB; given as that, or as a text such as "100G". It counts at
      #   creation
      attr_accessor :disk_size
      # @return [String] the template that the VM is made from
      attr_accessor :template
      # @return [String] a machine of this Vagrantfile, or a VM of the daemon, to clone
      attr_accessor :clone_from
      # @return [Array<String>] tags of the VM, besides `vagrant`
      attr_accessor :tags

      def initialize
        @host = UNSET_VALUE
        @id = UNSET_VALUE
        @cpus = UNSET_VALUE
        @memory = UNSET_VALUE
        @disk_size = UNSET_VALUE
        @template = UNSET_VALUE
        @clone_from = UNSET_VALUE
        @tags = UNSET_VALUE
      end

      # What is no number of CPUs or size stays as it is, for {#validate} to name.
      def finalize!
        @host = ENV["CATALYST_HOST"].to_s.strip if @host == UNSET_VALUE
        @host = Client::DEFAULT_HOST if @host.to_s.empty?
        @id = nil if @id == UNSET_VALUE
        @cpus = @cpus == UNSET_VALUE ? nil : Sizes.whole(@cpus)
        @memory = @memory == UNSET_VALUE ? nil : Sizes.mebibytes(@memory)
        @disk_size = @disk_size == UNSET_VALUE ? nil : Sizes.gibibytes(@disk_size)
        @template = nil if @template == UNSET_VALUE
        @clone_from = @clone_from == UNSET_VALUE ? nil : @clone_from&.to_s
        @tags = @tags == UNSET_VALUE ? [] : Array(@tags).map(&:to_s)
      end

      def validate(machine)
        errors = _detected_errors + address_errors + size_errors + origin_errors(machine)
        { "Catalyst" => errors }
      end

      # The tags that the VM gets.
      def all_tags
        ["vagrant", *tags].uniq
      end

      private

      def address_errors
        errors = []
        errors << wrong("host", value: @host) if Client.parse_host(@host).nil?
        errors << wrong("id", value: @id) unless @id.nil? || ID.match?(@id.to_s)
        good = all_tags.length <= MOST_TAGS && all_tags.all? { |tag| TAG.match?(tag) }
        errors << wrong("tags", value: @tags.join(", "), most: MOST_TAGS) unless good
        errors
      end

      def size_errors
        errors = []
        errors << wrong("cpus", value: @cpus, most: CPUS.last) unless fits?(@cpus, CPUS)
        unless fits?(@memory, LEAST_MEMORY_MIB..)
          errors << wrong("memory", value: @memory, least: LEAST_MEMORY_MIB)
        end
        unless fits?(@disk_size, DISK_GIB)
          errors << wrong("disk_size", value: @disk_size, least: DISK_GIB.first, most: DISK_GIB.last)
        end
        errors
      end

      def fits?(value, range)
        value.nil? || (value.is_a?(Integer) && range.cover?(value))
      end

      # A VM comes from a template, a box or another VM, and a box and another VM bring their disk.
      def origin_errors(machine)
        errors = []
        box = machine.config.vm.box
        given = { "template" => @template, "clone_from" => @clone_from, "config.vm.box" => box }.compact.keys
        errors << wrong("origins", names: given.join(", ")) if given.length > 1
        other = given.find { |name| name != "template" }
        errors << wrong("disk_of_origin", origin: other) if @disk_size && other
        errors << wrong("itself", value: @clone_from) if own_ancestor?(machine)
        errors
      end

      def own_ancestor?(machine)
        seen = []
        parent = machine
        seen << parent.name while (parent = parent.provider.parent_machine) && !seen.include?(parent.name)
        seen.include?(machine.name)
      end

      def wrong(key, **values)
        I18n.t("vagrant_catalyst.config.#{key}", **values)
      end
    end
  end
end
