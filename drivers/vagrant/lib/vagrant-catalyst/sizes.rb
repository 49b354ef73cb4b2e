# frozen_string_literal: true

module VagrantPlugins
  module Catalyst
    # Sizes as people write them: 2048, "2048", "2G", "2GB", "2 GiB". Units are powers of 1024.
    module Sizes
      SIZE = /\A([0-9]{1,9})\s*(?:([mgt])(?:i?b)?)?\z/i.freeze
      MEBIBYTES = { "m" => 1, "g" => 1 << 10, "t" => 1 << 20 }.freeze

      module_function

      # A whole number, also as a text; anything else as it is.
      def whole(value)
        value.is_a?(String) && value.strip.match?(/\A[0-9]{1,9}\z/) ? value.to_i : value
      end

      # A size in MiB, which is what a bare number counts; anything else as it is.
      def mebibytes(value)
        number, unit = parse(value)
        return value if number.nil?

        unit ? number * MEBIBYTES.fetch(unit) : number
      end

      # A size in GiB, which is what a bare number counts; what is not whole GiB, and anything else, as it is.
      def gibibytes(value)
        number, unit = parse(value)
        return value if number.nil?
        return number if unit.nil?

        gibibytes, rest = (number * MEBIBYTES.fetch(unit)).divmod(1 << 10)
        rest.zero? ? gibibytes : value
      end

      def parse(value)
        found = SIZE.match(value.to_s.strip) if value.is_a?(Integer) || value.is_a?(String)
        [found[1].to_i, found[2]&.downcase] if found
      end
    end
  end
end
